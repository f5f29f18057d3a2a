"""A torch.distributed backend whose ranks are threads of one process: a collective is P tensors put into one place.

Over sockets an all-reduce of eight ranks on two cores takes 10 ms, here 0.2: tests of equality need the result, not the
way. Everything is asynchronous, as with gloo: a call puts a copy of what it sends, ``wait()`` fetches what others put.
Unlike gloo it notices when ranks of a group do not call the same.
"""

import itertools
import threading
from datetime import timedelta

import torch
import torch.distributed as dist


class _Place:
    """Where the P ranks of a group put what they send in one collective, or one rank what it sends to another."""

    def __init__(self, count):
        self.parts, self.missing, self.left = [None] * count, count, count
        self.complete, self.kind, self.total, self.failure = threading.Event(), None, None, None


class Office:
    """What all groups of one run share; ``close`` makes everybody who waits, or will wait, raise."""

    def __init__(self):
        self.lock, self.places, self.closed = threading.Lock(), {}, None

    def place(self, key, count):
        with self.lock:
            if key not in self.places:
                self.places[key] = _Place(count)
            return self.places[key]

    def put(self, key, count, index, kind, part):
        place = self.place(key, count)
        with self.lock:
            if place.kind not in (None, kind):
                place.failure = f"ranks of a group differ: one calls {place.kind}, another {kind}"
                place.complete.set()
                raise RuntimeError(place.failure)
            place.kind, place.parts[index] = kind, part
            place.missing -= 1
            if not place.missing:
                place.complete.set()
        return place

    def fetch(self, key, place, timeout):
        if not place.complete.wait(timeout) and not self.closed:
            raise RuntimeError(f"timed out after {timeout} s in {place.kind or 'receive'}: a rank is missing")
        if place.failure or not all(part is not None for part in place.parts):
            raise RuntimeError(place.failure or self.closed)
        with self.lock:
            place.left -= 1
            if not place.left:
                self.places.pop(key, None)
        return place.parts

    def close(self, reason):
        with self.lock:
            self.closed = self.closed or f"Connection closed by peer: {reason}"
            for place in self.places.values():
                place.complete.set()


class _Work(dist._Work):
    def __init__(self, finish):
        super().__init__()
        self._finish, self._done = finish, False

    def wait(self, timeout=timedelta(0)):
        if not self._done:
            with torch.no_grad():
                self._finish()
            self._done = True
        return True

    def is_completed(self):
        return self._done


REDUCE = {dist.ReduceOp.SUM: torch.add, dist.ReduceOp.AVG: torch.add, dist.ReduceOp.MAX: torch.maximum,
          dist.ReduceOp.MIN: torch.minimum, dist.ReduceOp.PRODUCT: torch.mul, dist.ReduceOp.BAND: torch.bitwise_and,
          dist.ReduceOp.BOR: torch.bitwise_or}


def _reduced(parts, op):
    """In the order of the ranks, the same on all of them."""
    function = next(f for known, f in REDUCE.items() if op == known)
    total = parts[0].clone()
    for part in parts[1:]:
        function(total, part, out=total)
    return total.div_(len(parts)) if op == dist.ReduceOp.AVG else total


class ThreadGroup(dist.ProcessGroup):
    def __init__(self, office, name, rank, size, timeout):
        super().__init__(rank, size)
        self._office, self._name, self._timeout = office, name, timeout.total_seconds()
        self._calls, self._letters = itertools.count(), {}

    def getBackendName(self):
        return "threads"

    def _call(self, kind, part, finish):
        """Put ``part`` into the group's next collective; at ``wait()`` finish(everyone's parts)."""
        if self._office.closed:
            raise RuntimeError(self._office.closed)
        key = self._name, next(self._calls)
        place = self._office.put(key, self.size(), self.rank(), kind, part)
        return _Work(lambda: finish(self._office.fetch(key, place, self._timeout)))

    def allreduce(self, tensors, opts=None):
        op = opts.reduceOp if opts is not None else dist.ReduceOp.SUM

        def finish(parts):
            for i, tensor in enumerate(tensors):
                tensor.copy_(_reduced([part[i] for part in parts], op))
        return self._call(f"all_reduce {[tuple(t.shape) for t in tensors]}", [t.detach().clone() for t in tensors],
                          finish)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors, opts):
        def finish(parts):
            if self.rank() != opts.rootRank:
                tensors[0].copy_(parts[opts.rootRank])
        is_root = self.rank() == opts.rootRank
        return self._call(f"broadcast {tensors[0].numel()}", tensors[0].detach().clone() if is_root else (), finish)

    def allgather(self, outputs, inputs, opts=None):
        def finish(parts):
            for output, part in zip(outputs[0], parts):
                output.copy_(part)
        return self._call(f"all_gather {tuple(inputs[0].shape)}", inputs[0].detach().clone(), finish)

    def all_gather_single(self, output, input, opts=None):
        return self.allgather([list(output.view(self.size(), *input.shape))], [input])

    def reduce_scatter(self, outputs, inputs, opts):
        def finish(parts):
            outputs[0].copy_(_reduced([part[self.rank()] for part in parts], opts.reduceOp))
        return self._call("reduce_scatter", [t.detach().clone() for t in inputs[0]], finish)

    def reduce_scatter_single(self, output, input, opts):
        return self.reduce_scatter([output], [list(input.view(self.size(), *output.shape))], opts)

    def alltoall(self, outputs, inputs, opts=None):
        def finish(parts):
            for output, part in zip(outputs, parts):
                output.copy_(part[self.rank()])
        return self._call("all_to_all", [t.detach().clone() for t in inputs], finish)

    def all_to_all_single(self, output, input, output_sizes, input_sizes, opts=None):
        def cut(tensor, sizes):
            return tensor.split(sizes or [tensor.size(0) // self.size()] * self.size())
        return self.alltoall(cut(output, output_sizes), cut(input, input_sizes))

    def gather(self, outputs, inputs, opts):
        def finish(parts):
            for output, part in zip(outputs[0] if self.rank() == opts.rootRank else (), parts):
                output.copy_(part)
        return self._call("gather", inputs[0].detach().clone(), finish)

    def scatter(self, outputs, inputs, opts):
        mine = [t.detach().clone() for t in inputs[0]] if self.rank() == opts.rootRank else ()
        return self._call("scatter", mine, lambda parts: outputs[0].copy_(parts[opts.rootRank][self.rank()]))

    def barrier(self, opts=None):
        return self._call("barrier", (), lambda parts: None)

    def _letter(self, source, to, tag):
        """The name of the next message between the two."""
        way = source, to, tag
        self._letters[way] = self._letters.get(way, 0) + 1
        return (self._name, *way, self._letters[way])

    def send(self, tensors, to, tag=0):
        if self._office.closed:
            raise RuntimeError(self._office.closed)
        self._office.put(self._letter(self.rank(), to, tag), 1, 0, "send", tensors[0].detach().clone())
        return _Work(lambda: None)

    def recv(self, tensors, source, tag=0):
        key = self._letter(source, self.rank(), tag)
        place = self._office.place(key, 1)

        def finish():
            [part] = self._office.fetch(key, place, self._timeout)
            if part.numel() != tensors[0].numel() or part.dtype != tensors[0].dtype:
                raise RuntimeError(f"{tuple(part.shape)} {part.dtype} was sent where {tuple(tensors[0].shape)} "
                                   f"{tensors[0].dtype} is received")
            tensors[0].copy_(part.view(tensors[0].shape))
        return _Work(finish)

    def shutdown(self):
        pass

    # the names of these methods before torch 2.13
    _allgather_base, _reduce_scatter_base, alltoall_base = all_gather_single, reduce_scatter_single, all_to_all_single


_offices = {}  # name -> Office, of the runs that go on


def open_office(store):
    """For the groups that will be made with this dist.HashStore; ``close_office`` when its run is over."""
    office = Office()
    _offices[str(id(office))] = office
    store.set("office", str(id(office)))
    return office


def close_office(office):
    office.close("the run is over")
    del _offices[str(id(office))]


def _create(group, _):
    office = _offices[group.store._underlying_non_prefix_store.get("office").decode()]
    name = group.group_id, *group.global_ranks_in_group
    return ThreadGroup(office, name, group.group_rank, group.group_size, group.timeout)


dist.Backend.register_backend("threads", _create, extended_api=True, devices=["cpu"])
