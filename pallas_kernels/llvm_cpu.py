"""Kernels for the CPU: LLVM IR, compiled for this processor, called by XLA.

Pallas compiles for TPUs and GPUs. On a CPU XLA reads the weights of a product
with two to sixteen rows twice, because it packs them for its large products
first. Here a kernel is a Python function that emits one part of an operation
with the words of `llvm_ir`:

    def emit(builder, static, pointers, part):
      ...                          # one part of the columns, say

    def operation(x, w):
      return llvm_cpu.call(emit, (..., parts), (x, w), result, parts=parts)

LLVM compiles it for the processor that it is running on, and XLA calls it
through its foreign function interface. A team of threads, one a core, takes
part after part, so which thread takes which does not change a result. A call
while the team is at work for another one runs all of its parts itself.
"""

from collections.abc import Callable, Sequence
import ctypes
import functools
import hashlib
import os
import pathlib
import re
import sys
import threading
from typing import Any

import jax

from pallas_kernels import shards
from pallas_kernels.llvm_ir import binding
from pallas_kernels.llvm_ir import ir
from pallas_kernels.llvm_ir import number
from pallas_kernels.llvm_ir import place

# Emits one part of the work: a builder, static choices, pointers to the
# arguments and the results, and which part it is (an i64).
Emit = Callable[[Any, Any, Sequence[Any], Any], None]

# Rounds that an idle thread looks for work before it sleeps: some 50 us, which
# is longer than what lies between two products of a model.
_SPIN = 1000
_CLOSED = 0xFFFFFF  # no part has this number


def missing() -> str | None:
  """Why kernels cannot be compiled and run here, or None if they can.

  Where programs are for another platform, compiling for this one is time lost.
  """
  if ir is None:
    return 'llvmlite is not installed (the extra `cpu`)'
  if sys.platform != 'linux' or os.uname().machine not in _PAUSE:
    return f'it is for Linux on {" and ".join(_PAUSE)}'
  if not _header().is_file():
    return f"{_header()} of XLA's interface is missing"
  if jax.default_backend() != 'cpu':
    return f'programs are for a {jax.default_backend()} here'
  return None


def parts() -> int:
  """Parts to cut work into: two a core, so that a late thread costs little."""
  return 2 * _cores()


def _cores() -> int:
  return len(os.sched_getaffinity(0))


def call(
  emit: Emit,
  static: Any,
  args: Sequence[jax.Array],
  result: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
  *,
  parts: int,
) -> jax.Array | list[jax.Array]:
  """The result of a kernel, in a program for a CPU where nothing is `missing`.

  Args:
    emit: A function of a module.
    static: Hashable; with `emit` it says which kernel it is.
    args: Arrays, which the kernel is given as pointers, rows first.
    result: What it fills, one array or several.
    parts: Of the work, 1 or more.
  """
  one = isinstance(result, jax.ShapeDtypeStruct)
  results = 1 if one else len(result)
  target = _register(emit, static, len(args), results, parts)
  # A batch is rare here (a test that maps over models): one after another.
  run = jax.ffi.ffi_call(target, result, vmap_method='sequential')
  # Inside `shard_map` results differ from device to device as arguments do.
  return shards.like(run(*args), args)


# From IR to a function that XLA calls.


@functools.cache
def _register(
  emit: Emit, static: Any, num_args: int, num_results: int, parts: int
) -> str:
  """Compiles a kernel and tells XLA of it; the name that XLA knows it by."""
  sizes = f'{num_args} {num_results} {parts}'
  what = f'{emit.__module__}.{emit.__qualname__} {static} {sizes}'
  name = f'llvm_cpu_{hashlib.sha256(what.encode()).hexdigest()[:16]}'
  module = ir.Module(name)
  work = _part_function(module, emit, static, num_args + num_results)
  _handler(module, work, num_args, num_results, parts)
  _team()
  address = _compiled(module).get_function_address('handler')
  capsule = ctypes.pythonapi.PyCapsule_New
  capsule.restype = ctypes.py_object
  capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
  jax.ffi.register_ffi_target(
    name, capsule(address, None, None), platform='cpu'
  )
  return name


def _part_function(module, emit: Emit, static: Any, num_pointers: int):
  """`void part(pointers, i)`."""
  pointer = ir.PointerType()
  kind = ir.FunctionType(ir.VoidType(), [pointer, ir.IntType(64)])
  function = ir.Function(module, kind, 'part')
  builder = ir.IRBuilder(function.append_basic_block())
  pointers = [
    builder.load(place(builder, function.args[0], i, pointer), typ=pointer)
    for i in range(num_pointers)
  ]
  emit(builder, static, pointers, function.args[1])
  builder.ret_void()
  return function


# Offsets of the fields that are read, in jaxlib/include/xla/ffi/api/c_api.h.
_FRAME = {'extension': 8, 'arguments': 72, 'results': 112}
_DATA_OF_BUFFER = 24
_KIND_OF_EXTENSION, _METADATA_OF_EXTENSION = 8, 24
_MAJOR_OF_METADATA, _MINOR_OF_METADATA = 24, 28


def _handler(module, part, num_args: int, num_results: int, parts: int) -> None:
  """`XLA_FFI_Error* handler(XLA_FFI_CallFrame*)`; null is success."""
  pointer, i32, i64 = ir.PointerType(), ir.IntType(32), ir.IntType(64)
  handler = ir.Function(module, ir.FunctionType(pointer, [pointer]), 'handler')
  builder = ir.IRBuilder(handler.append_basic_block())
  (frame,) = handler.args
  success = ir.Constant(pointer, None)

  def field(base, offset, kind=pointer):
    return builder.load(place(builder, base, offset, ir.IntType(8)), typ=kind)

  # Once XLA asks which version of its interface this is written for.
  extension = field(frame, _FRAME['extension'])
  with builder.if_then(builder.icmp_unsigned('!=', extension, success)):
    kind = field(extension, _KIND_OF_EXTENSION, i32)
    asks = ir.Constant(i32, _defined('XLA_FFI_Extension_Metadata ='))
    with builder.if_then(builder.icmp_unsigned('==', kind, asks)):
      metadata = field(extension, _METADATA_OF_EXTENSION)
      for offset, symbol in (
        (_MAJOR_OF_METADATA, 'define XLA_FFI_API_MAJOR'),
        (_MINOR_OF_METADATA, 'define XLA_FFI_API_MINOR'),
      ):
        version = ir.Constant(i32, _defined(symbol))
        builder.store(version, place(builder, metadata, offset, ir.IntType(8)))
      builder.ret(success)

  pointers = builder.alloca(pointer, num_args + num_results)
  buffers = [('arguments', i) for i in range(num_args)]
  buffers += [('results', i) for i in range(num_results)]
  for slot, (which, i) in enumerate(buffers):
    listed = field(frame, _FRAME[which])
    buffer = builder.load(place(builder, listed, i, pointer), typ=pointer)
    data = field(buffer, _DATA_OF_BUFFER)
    builder.store(data, place(builder, pointers, slot, pointer))
  share = ir.FunctionType(ir.VoidType(), [pointer, pointer, i64])
  run = ir.Function(module, share, _RUN)
  builder.call(run, [part, pointers, number(parts)])
  builder.ret(success)


def _compiled(module) -> Any:
  """Machine code of a module; it is never freed, for threads may be in it."""
  binding.initialize_native_target()
  binding.initialize_native_asmparser()
  binding.initialize_native_asmprinter()
  target = binding.Target.from_default_triple()
  machine = target.create_target_machine(
    cpu=binding.get_host_cpu_name(),
    features=binding.get_host_cpu_features().flatten(),
    opt=3,
  )
  parsed = binding.parse_assembly(str(module))
  parsed.verify()
  options = binding.create_pipeline_tuning_options(speed_level=3)
  passes = binding.create_pass_builder(machine, options)
  passes.getModulePassManager().run(parsed, passes)
  engine = binding.create_mcjit_compiler(parsed, machine)
  engine.finalize_object()
  for kept in (engine, machine, passes):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
  return engine


@functools.cache
def _header() -> pathlib.Path:
  return pathlib.Path(jax.ffi.include_dir()) / 'xla/ffi/api/c_api.h'


def _defined(symbol: str) -> int:
  """A number in XLA's header, which the installed jaxlib brings along."""
  found = re.search(rf'{symbol} (\d+)', _header().read_text(encoding='utf-8'))
  return int(found[1])


# The team of threads.

_RUN = 'efficiency_jax_run_parts'
_PAUSE = {'x86_64': 'pause', 'aarch64': 'yield'}


@functools.cache
def _team() -> None:
  """Starts the threads, and lets kernels find `run`."""
  code = _TEAM.format(
    run=_RUN, pause=_PAUSE[os.uname().machine], spin=_SPIN, closed=_CLOSED
  )
  engine = _compiled(code)
  native = lambda name: ctypes.CFUNCTYPE(None)(
    engine.get_function_address(name)
  )
  native('init')()
  binding.add_symbol(_RUN, engine.get_function_address(_RUN))
  work = native('work')
  for _ in range(_cores() - 1):
    # ctypes lets go of Python's lock for as long as the thread lives.
    threading.Thread(target=work, daemon=True).start()


# One job at a time. `@next` is its number (high bits) and the next part that
# nobody has taken (low 24 bits); a part is taken by counting it up, which fails
# if another job has begun meanwhile. So what a thread read about a job before
# it took a part is true of that job. While a job is written down, `@next` is
# closed: no part has such a number.
_TEAM = """
@next = global i64 {closed}
@done = global i64 0
@busy = global i64 0
@asleep = global i64 0
@bell = global [8 x i64] zeroinitializer  ; a sem_t
@part = global ptr null
@pointers = global ptr null
@parts = global i64 0

declare i32 @sem_init(ptr, i32, i32)
declare i32 @sem_wait(ptr)
declare i32 @sem_post(ptr)

define void @init() {{
  %ignored = call i32 @sem_init(ptr @bell, i32 0, i32 0)
  ret void
}}

; Takes a part and does it. False if there is none.
define internal i1 @take() {{
  %next = load atomic i64, ptr @next seq_cst, align 8
  %i = and i64 %next, {closed}
  %part = load ptr, ptr @part
  %pointers = load ptr, ptr @pointers
  %parts = load i64, ptr @parts
  %open = icmp slt i64 %i, %parts
  br i1 %open, label %try, label %none
try:
  %after = add i64 %next, 1
  %swap = cmpxchg ptr @next, i64 %next, i64 %after seq_cst seq_cst
  %mine = extractvalue {{i64, i1}} %swap, 1
  br i1 %mine, label %do, label %lost
do:
  call void %part(ptr %pointers, i64 %i)
  %before = atomicrmw add ptr @done, i64 1 seq_cst
  br label %lost
lost:
  ret i1 true
none:
  ret i1 false
}}

; A thread's life: look for parts, and sleep when there have been none for long.
define void @work() {{
  br label %look
look:
  %tries = phi i64 [0, %0], [0, %look], [%more, %wait], [0, %awake]
  %found = call i1 @take()
  br i1 %found, label %look, label %wait
wait:
  call void asm sideeffect "{pause}", ""()
  %more = add i64 %tries, 1
  %tired = icmp sgt i64 %more, {spin}
  br i1 %tired, label %lie_down, label %look
lie_down:
  %a = atomicrmw add ptr @asleep, i64 1 seq_cst
  ; A job that began before it was counted rang for nobody.
  %last = call i1 @take()
  br i1 %last, label %awake, label %sleep
sleep:
  %b = call i32 @sem_wait(ptr @bell)
  br label %awake
awake:
  %c = atomicrmw sub ptr @asleep, i64 1 seq_cst
  br label %look
}}

; Runs part(pointers, 0), ..., part(pointers, parts - 1), and waits for them.
define void @{run}(ptr %part, ptr %pointers, i64 %parts) {{
  %got = cmpxchg ptr @busy, i64 0, i64 1 seq_cst seq_cst
  %mine = extractvalue {{i64, i1}} %got, 1
  br i1 %mine, label %together, label %alone
alone:
  %i = phi i64 [0, %0], [%following, %alone]
  call void %part(ptr %pointers, i64 %i)
  %following = add i64 %i, 1
  %unfinished = icmp slt i64 %following, %parts
  br i1 %unfinished, label %alone, label %return
together:
  %old = load atomic i64, ptr @next seq_cst, align 8
  %job = or i64 %old, {closed}
  %closed = atomicrmw xchg ptr @next, i64 %job seq_cst
  store ptr %part, ptr @part
  store ptr %pointers, ptr @pointers
  store i64 %parts, ptr @parts
  store atomic i64 0, ptr @done seq_cst, align 8
  %opened = add i64 %job, 1  ; the next job's number, part 0
  %ignored = atomicrmw xchg ptr @next, i64 %opened seq_cst
  %sleepers = load atomic i64, ptr @asleep seq_cst, align 8
  br label %wake
wake:
  %rung = phi i64 [0, %together], [%rings, %ring]
  %enough = icmp sge i64 %rung, %sleepers
  br i1 %enough, label %help, label %ring
ring:
  %r = call i32 @sem_post(ptr @bell)
  %rings = add i64 %rung, 1
  br label %wake
help:
  %helped = call i1 @take()
  br i1 %helped, label %help, label %wait
wait:
  %done = load atomic i64, ptr @done seq_cst, align 8
  %complete = icmp eq i64 %done, %parts
  br i1 %complete, label %free, label %pause
pause:
  call void asm sideeffect "{pause}", ""()
  br label %wait
free:
  store atomic i64 0, ptr @busy seq_cst, align 8
  br label %return
return:
  ret void
}}
"""
