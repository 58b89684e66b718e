"""What gpu_check.py runs: one module for each stage, and what they share.

report      the file that keeps every result at once
machine     what the figures were measured on
stage       checks, one after the other, in a process of their own
timing      seconds and memory of steps
numerics    is the arithmetic right?
student     what does a step of a student cost?
teacher     how fast does a teacher label?
pipeline    does all of it work together?
"""

STAGES = ("numerics", "student", "teacher", "pipeline")
