"""Studies: which arms are compared, on what, by which protocol, and what the stored rows say."""
