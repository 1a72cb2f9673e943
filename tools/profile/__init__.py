"""What a bundle's time goes to on this machine, and what it could be at best: behind `blt-edge profile`."""
