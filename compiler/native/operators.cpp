// The operators as `torch.ops.attnopt`. Torch's header for it takes as long to compile as a kernel,
// and so is read here alone.
//
// torch keeps compiled code that calls them on disk, under their names and arguments: an operator
// that takes others than before needs another name, or an argument without default.

#include "operators.h"

#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(attnopt, m) {
  m.def("few_rows(Tensor x, Tensor weights, Tensor? biases, int[] at, int[] outs, int gate) -> Tensor");
  m.def("hold_memory(bool on) -> ()", attnopt::hold_memory);
  m.def("keep_memory(bool on) -> ()", attnopt::keep_memory);
  m.def("many_rows(Tensor x, Tensor weights, Tensor? biases, int[] at, int[] outs, int gate) -> Tensor");
  m.def("matrix_units() -> bool", attnopt::matrix_units);
  m.def("one_token(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
  m.def("prompt(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(attnopt, CPU, m) {
  m.impl("few_rows", attnopt::few_rows);
  m.impl("many_rows", attnopt::many_rows);
  m.impl("one_token", attnopt::one_token);
  m.impl("prompt", attnopt::prompt);
}
