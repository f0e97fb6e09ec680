"""The parts of the pair stage: candidates from the ledgers, what each prompt is used for, the table of counts."""
