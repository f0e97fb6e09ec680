"""Names of tensors: one model under two namings, shown under one of them."""
