"""Where the bytes of a training step go, for ``tools/profile_memory.py``.

``options`` makes a ``setup`` of the command line, and ``commands`` does what it says. For each experiment
``measurement`` starts a process that runs a few ``steps`` under the ``tracker`` (``memory_process``): every tensor
operation becomes ``events`` of storages, which have ``owners`` and belong to ``components``; ``saved_tensors`` and
``allocator`` tell what autograd and torch hold; ``replay`` makes the course of memory of them and ``profile_fields``
the fields of a ``result``. ``rounds`` times all experiments without the tracker, one step of each in turn.
``simulate`` does the same without data. From stored results come ``derived`` figures, ``tables``, ``pictures`` (with
``timeline_picture``), an ``html_page``, the ``report`` that has them all, and what ``compare`` says of two.
"""
