"""What a run computes with: the device, the cores, and the processes that a launcher started."""
