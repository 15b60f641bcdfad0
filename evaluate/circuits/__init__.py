"""Attribution graphs: which latents, through which others, lead to a prediction."""
