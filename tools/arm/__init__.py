"""Proof on processors that need not be here: Arm and old x86-64, by emulation, or this machine's own."""
