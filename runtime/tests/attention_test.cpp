// Against the formula in double: head sizes, sizes that fill no vector, masks, strides, threads, NaN, untouched memory.
#include "lumiere/attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.hpp"
#include "sample_data.hpp"

using namespace lumiere;

namespace {

struct Problem {
  std::int64_t sequences, heads, queries, keys, head_dim;
  bool masked;

  std::int64_t width() const { return heads * head_dim; }
};

void check(AttentionPart part, const Problem& p) {
  // q in rows of its own; k and v side by side in one row, as a projection gives them; out with a gap after each row.
  const std::int64_t c = p.width(), out_row = c + 3;
  const float untouched = 42.0f;
  std::vector<float> q(static_cast<std::size_t>(p.sequences * p.queries * c));
  std::vector<float> kv(static_cast<std::size_t>(p.sequences * p.keys * 2 * c));
  std::vector<float> out(static_cast<std::size_t>(p.sequences * p.queries * out_row), untouched);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = value_at(i);
  for (std::size_t i = 0; i < kv.size(); ++i) kv[i] = value_at(i + 11);
  std::vector<char> mask(static_cast<std::size_t>(p.sequences * p.keys));
  for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 != 1;
  const auto address = [](auto* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
  const float scale = 0.05f;
  const Attention call{{address(q.data()), p.queries * c, c},
                       {address(kv.data()), p.keys * 2 * c, 2 * c},
                       {address(kv.data() + c), p.keys * 2 * c, 2 * c},
                       {address(out.data()), p.queries * out_row, out_row},
                       ElementType::float32, p.sequences, p.heads, p.queries, p.keys, p.head_dim, scale,
                       p.masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr};
  attention(call, part, run_in_threads, 3);
  const std::vector<float> threaded = out;
  attention(call, part, nullptr, 3);
  CHECK(std::memcmp(out.data(), threaded.data(), out.size() * sizeof(float)) == 0);

  double worst = 0.0;
  for (std::int64_t s = 0; s < p.sequences; ++s) {
    for (std::int64_t i = 0; i < p.queries; ++i) {
      const float* row = out.data() + (s * p.queries + i) * out_row;
      for (std::int64_t gap = c; gap < out_row; ++gap) CHECK(row[gap] == untouched);
      for (std::int64_t h = 0; h < p.heads; ++h) {
        std::vector<double> weights(static_cast<std::size_t>(p.keys));
        double most = -std::numeric_limits<double>::infinity(), total = 0.0;
        for (std::int64_t j = 0; j < p.keys; ++j) {
          double score = 0.0;
          for (std::int64_t d = h * p.head_dim; d < (h + 1) * p.head_dim; ++d) {
            score += double(q[static_cast<std::size_t>((s * p.queries + i) * c + d)]) *
                     kv[static_cast<std::size_t>((s * p.keys + j) * 2 * c + d)];
          }
          const bool seen = !p.masked || mask[static_cast<std::size_t>(s * p.keys + j)];
          weights[static_cast<std::size_t>(j)] = seen ? score * scale : -std::numeric_limits<double>::infinity();
          most = std::max(most, weights[static_cast<std::size_t>(j)]);
        }
        for (double& weight : weights) total += weight = std::isinf(weight) ? 0.0 : std::exp(weight - most);
        for (std::int64_t d = h * p.head_dim; d < (h + 1) * p.head_dim; ++d) {
          double expected = 0.0;
          for (std::int64_t j = 0; j < p.keys; ++j) {
            expected += weights[static_cast<std::size_t>(j)] / total * kv[static_cast<std::size_t>((s * p.keys + j) * 2 * c + c + d)];
          }
          worst = std::max(worst, std::abs(row[d] - expected));
        }
      }
    }
  }
  CHECK(worst < 1e-5);  // values up to 3.3; scores up to about 30, each with an error of some eps
}

void check_special(AttentionPart part) {
  std::vector<float> q(16, 1.0f), kv(2 * 16 * 3, 0.5f), out(16, 42.0f);
  bool mask[3] = {false, false, false};
  const auto address = [](auto* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
  const Attention call{{address(q.data()), 0, 16}, {address(kv.data()), 0, 32}, {address(kv.data() + 16), 0, 32},
                       {address(out.data()), 0, 16}, ElementType::float32, 1, 1, 1, 3, 16, 1.0f, mask};
  attention(call, part, nullptr, 1);
  for (const float value : out) CHECK(value == 0.0f);  // no key is seen
  mask[1] = true;
  attention(call, part, nullptr, 1);
  for (const float value : out) CHECK(value == 0.5f);
  for (const std::size_t place : {std::size_t{0}, std::size_t{32 + 5}, std::size_t{32 + 16 + 5}}) {  // in q, k, v
    std::vector<float>& where = place == 0 ? q : kv;
    const float before = where[place];
    where[place] = std::numeric_limits<float>::quiet_NaN();
    attention(call, part, nullptr, 1);
    CHECK(std::isnan(out[5]));
    where[place] = before;
  }
}

}  // namespace

int main() {
  for (int index = 0; index < num_inner_loops(); ++index) {
    const AttentionPart part = attention_part_by_index(index);
    if (part == nullptr) continue;
    for (const bool masked : {false, true}) {
      for (const std::int64_t head_dim : {16, 32, 64}) {
        check(part, {1, 1, 1, 1, head_dim, masked});
        check(part, {2, 3, 7, 5, head_dim, masked});
        check(part, {3, 2, 17, 33, head_dim, masked});
        check(part, {1, 2, 300, 24, head_dim, masked});
      }
    }
    check_special(part);
  }
  CHECK(has_attention(32) && !has_attention(24));
  return 0;
}
