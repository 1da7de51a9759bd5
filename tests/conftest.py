"""What every test gets: one torch thread, since the tests themselves run side by side."""

import torch

torch.set_num_threads(1)
