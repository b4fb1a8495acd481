"""What every test shares: one thread, and the same examples in every run."""

import torch
from hypothesis import settings

settings.register_profile("moekit", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("moekit")
torch.set_num_threads(1)
