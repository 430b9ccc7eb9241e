"""A policy behind a socket: wires, engine, guard and server. What a robot imports from here never imports torch."""
