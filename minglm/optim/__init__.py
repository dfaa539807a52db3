"""Optimizer and schedules (paper 2.4): `muon.Muon`, and pure functions of the tokens seen in `schedule`."""
