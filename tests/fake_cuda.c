// Preloaded, this replaces the two functions of CUDA that autograd needs to run a backward on fake CUDA tensors.
int fake_devices = 0;  // torch must find no device until it has installed its device guard for fake tensors

signed char _ZN3c104cuda12device_countEv(void) { return fake_devices; }  // c10::cuda::device_count()

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}
