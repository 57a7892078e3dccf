"""Write the text that the demo model's calibration was measured on: stories of a seed of their own.

python training/calibration_text.py > /tmp/calibration.txt
"""

from stories import write_stories

if __name__ == "__main__":
    print("\n\n".join(write_stories(600, seed=4)))
