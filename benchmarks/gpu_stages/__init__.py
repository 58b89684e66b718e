"""What gpu_check.py runs: a module or a folder for each stage, and what they share.

report      the file that keeps every result at once
machine     what the figures were measured on
stage       checks, one after the other, in a process of their own
timing      seconds and memory of steps
numerics    is the arithmetic right? layers of branches, whole networks, soft labels and losses, training
student     what does a step of a student cost? eager, compiled and as CUDA graphs, and beside a teacher
teacher     how fast does a teacher label?
pipeline    does all of it work together? the commands, the loader beside a student, copies, two processes
"""

STAGES = ("numerics", "student", "teacher", "pipeline")
