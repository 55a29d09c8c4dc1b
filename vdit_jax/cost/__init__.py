"""What a program costs: FLOPs, chips, a reading of compiled HLO."""
