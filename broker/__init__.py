"""The broker: hands steps to workers and answers to edges. Never imports torch."""
