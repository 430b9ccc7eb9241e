"""Foreign data in, one format out: recorders, converters and checks that write LeRobotDataset v3.0. No torch here."""
