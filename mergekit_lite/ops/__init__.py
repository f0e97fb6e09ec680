"""Operations on blocks of weights, by torch or by compiled code."""
