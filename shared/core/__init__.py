"""What every stage needs: configuration, the command line, errors, files on disk, devices and cores."""
