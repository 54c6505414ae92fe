"""The tests that `python -m pytest` leaves out, with the seconds each took on an idle core; `-m slow` runs them.

Each repeats, longer or under another launcher, what a faster test asserts too.
"""

SECONDS = {
    "test_compare.py::test_in_fp32_all_systems_have_the_same_losses": 40,
    "test_compare.py::test_two_processes_share_the_rows_of_a_step": 25,
    "test_first_run.py::test_a_run_without_flags_learns_held_out_rows_and_prints_predictions": 60,
    "test_launch.py::test_the_large_preset_is_one_training_of_two_processes": 40,
    "test_savers.py::test_compiled_layers_train_alike_with_recompute_inside[t5]": 120,
    "test_soak.py::test_a_run_killed_again_and_again_ends_on_the_bits_of_one_never_killed": 50,
}
