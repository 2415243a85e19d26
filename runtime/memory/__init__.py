"""Physical memory apart from the addresses it is seen at: pages, their mapping, and what is in them.

``virtual_memory`` says what a device must be able to do, ``cpu_memory``, ``cuda_memory`` and ``npu_memory`` do it,
``page_pool`` knows who holds each page, ``xtensor`` gives every sequence one contiguous range, ``prefix_cache`` finds
pages by the tokens they were computed from. ``runtime/kv_cache.py`` puts them together.
"""
