// NVIDIA's management library of a machine with 8 GPUs, as far as torch calls it to count them.
int nvmlInit(void) { return 0; }

int nvmlInit_v2(void) { return 0; }

int nvmlDeviceGetCount_v2(int *count) {
    *count = 8;
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)(index + 1ul);
    return 0;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) { return 1; }
