"""LoRA adapters, which peft adds to the layers of a frozen model: add, load, save and merge them."""
