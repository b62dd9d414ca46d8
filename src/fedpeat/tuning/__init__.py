"""A participant's own work: local training, evaluation, and the distillation of an emulator."""
