"""Show, convert, verify and share SAEs: `thresher sae`."""
