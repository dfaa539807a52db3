"""Records of a run's log, and the report and figures that are made from them (paper section 4)."""
