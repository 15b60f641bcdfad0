"""What all stages use: configuration, the command line, errors, files on disk, devices, processes and cores."""
