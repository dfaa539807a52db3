"""The optimizer (`muon.Muon`) and its schedules, pure functions of the tokens seen (paper 2.4)."""
