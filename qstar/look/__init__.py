"""Show a text as one page in which a person sees the model think."""
