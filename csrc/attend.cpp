// attend as a torch op.
#include "library.h"

namespace ssmoe {
namespace {

constexpr int64_t kPiece = 512;  // tokens of a task

// q (b, h, d) of the accumulator's type, scaled; keys, values (b, h, c, d), length (b,) of them in use, at least 1.
Tensor attend(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& length) {
  const Kind kind = kind_of(keys);
  STD_TORCH_CHECK(keys.dim() == 4 && keys.is_contiguous() && values.is_contiguous() && values.numel() == keys.numel(),
                  "ssmoe cpu: keys and values must be contiguous, of one shape (b, h, c, d)");
  const int64_t b = keys.size(0), h = keys.size(1), room = keys.size(2), d = keys.size(3);
  expect(values, keys.scalar_type(), "values");
  expect(q, accumulator(kind), "q");
  expect(length, ScalarType::Long, "length");
  Keep keep;
  Attend a{};
  a.h = h, a.room = room, a.d = d, a.piece = kPiece;
  a.q = keep.flat(q, b * h * d, "q"), a.keys = keys.const_data_ptr(), a.values = values.const_data_ptr();
  a.length = static_cast<const int64_t*>(keep.flat(length, b, "length"));
  int64_t most = 0;
  for (int64_t i = 0; i < b; ++i) {
    STD_TORCH_CHECK(a.length[i] >= 1 && a.length[i] <= room, "ssmoe cpu: a length is not from 1 to ", room);
    most = std::max(most, a.length[i]);
  }
  a.pieces = std::max<int64_t>(1, (most + kPiece - 1) / kPiece);
  Tensor sums = empty({b * h * a.pieces, d + 2}, accumulator(kind)), y = empty({b, h * d}, keys.scalar_type());
  a.sums = sums.mutable_data_ptr(), a.y = y.mutable_data_ptr();
  run(kernels().attend_pieces[kind], a, b * h * a.pieces);
  run(kernels().attend_join[kind], a, b * h, 64);
  return y;
}

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_FRAGMENT(ssmoe, m) {
  m.def("attend(Tensor q, Tensor keys, Tensor values, Tensor length) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CPU, m) { m.impl("attend", TORCH_BOX(&ssmoe::attend)); }
