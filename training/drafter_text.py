"""Write the text whose beginnings the demo model's drafters were made of: stories of their own seed.

python training/drafter_text.py > /tmp/drafter.txt
"""

from stories import write_stories

if __name__ == "__main__":
    print("\n\n".join(write_stories(1600, seed=7)))
