"""What an operator of the pool recovers of prompts and answers: attacks, figures, defences."""
