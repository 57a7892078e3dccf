"""The stateless worker: middle layers for many sessions, their KV committed to a store."""
