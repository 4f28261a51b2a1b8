"""How numbers are held: FP8 and FP4 codes, block scales, packed cache rows."""
