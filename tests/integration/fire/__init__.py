"""The server under fire: clients that ask, clients that misbehave, reloads, and what must hold in the end."""
