"""What scorers share: their contract and registry, and the sandbox, worker and model head that some of them need."""
