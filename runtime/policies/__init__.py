"""Local scheduling as functions over plain data: orders, chunks, admission, preemption, the waiting queue's bound.

`local_scheduler.schedule` puts them together; nothing here knows the engine.
"""
