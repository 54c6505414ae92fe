"""Tests that `python -m pytest` leaves out, with the CPU seconds that each took; `python -m pytest -m slow` runs them.

Each repeats a fact of a faster test at full size, under another launcher or with another model.
"""

SECONDS = {
    "test_before_init.py::test_one_rank_plans_and_all_take_its_choice_or_its_refusal": 47,
    "test_compare.py::test_in_fp32_all_systems_have_the_same_losses": 40,
    "test_compare.py::test_two_processes_share_the_rows_of_a_step": 25,
    "test_deepspeed.py::test_whoever_asks_for_it_gets_the_run_of_one_process[accelerate]": 24,
    "test_deepspeed.py::test_whoever_asks_for_it_gets_the_run_of_one_process[deepspeed]": 21,
    "test_first_run.py::test_a_run_without_flags_learns_held_out_rows_and_prints_predictions": 60,
    "test_launch.py::test_every_accelerate_config_is_the_run_of_one_process[cpu]": 20,
    "test_launch.py::test_every_accelerate_config_is_the_run_of_one_process[multi_gpu]": 18,
    "test_launch.py::test_the_large_preset_is_one_training_of_two_processes": 101,
    "test_launch.py::test_two_processes_are_one_training[accelerate --config_file]": 18,
    "test_launch.py::test_two_processes_are_one_training[torch.distributed.launch]": 19,
    "test_meter.py::test_so_it_does_under_autocast": 16,
    "test_plan.py::test_a_prediction_is_within_a_tenth_of_real_tensors[qwen2]": 24,
    "test_plan.py::test_a_prediction_is_within_a_tenth_of_real_tensors[t5]": 59,
    "test_plan.py::test_deep_stacks_follow_from_shallow_ones[t5-depth0]": 15,
    "test_plan.py::test_deep_stacks_follow_from_shallow_ones[t5-depth1]": 16,
    "test_plan.py::test_so_it_is_on_two_processes": 37,
    "test_plan.py::test_so_it_is_with_two_copies_of_two_shards": 23,
    "test_plan.py::test_train_takes_what_fits_and_keeps_it_in_its_config": 39,
    "test_restart.py::test_a_process_manager_that_starts_the_run_again_gets_the_run_that_nobody_interrupted": 81,
    "test_restart.py::test_under_torchrun_a_killed_worker_comes_back_and_a_preempted_one_does_not": 61,
    "test_savers.py::test_compiled_layers_train_alike_with_recompute_inside[t5]": 120,
    "test_sharding.py::test_every_strategy_is_the_run_of_one_process_in_a_part_of_its_bytes[qwen2]": 12,
    "test_sharding.py::test_every_strategy_is_the_run_of_one_process_in_a_part_of_its_bytes[t5]": 16,
    "test_sharding.py::test_savers_keep_the_bits_of_a_sharded_run[t5]": 16,
    "test_soak.py::test_a_run_killed_again_and_again_ends_on_the_bits_of_one_never_killed": 50,
    "test_start.py::test_other_code_and_a_folder_that_is_not_shared_are_told": 16,
    "test_start.py::test_two_launchers_as_on_two_hosts_are_one_training[accelerate]": 24,
    "test_start.py::test_two_launchers_as_on_two_hosts_are_one_training[torchrun]": 24,
    "test_tensor_parallel.py::test_a_run_in_two_dimensions_is_that_of_whole_copies": 26,
}
