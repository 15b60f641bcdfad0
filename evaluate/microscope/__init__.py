"""The microscope: browse, search, try text on and steer the latents of a run in the browser."""
