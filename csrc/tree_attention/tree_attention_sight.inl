// Which keys the queries of a task see, by block. Included by the kernel.

#include "common/simd.inl"
#include "tree_attention/tree_attention_task.h"

namespace {

using mmdpo::TreeAttentionArgs;
using mmdpo::TreeAttentionTask;

constexpr int64_t kBlock = mmdpo::kTreeBlock;
constexpr int64_t kWidth = kLanes<float>;

// What a block of queries sees of a block of keys.
struct Sight {
  bool some;        // else nothing
  bool some_end;    // tree_end hides keys from some queries
  bool some_reach;  // some queries do not reach all keys
  bool diagonal;    // one block, whose queries each reach up to themselves
  bool masked() const { return some_end || some_reach; }
};

class Tree {
 public:
  // keys: padded to whole blocks.
  Tree(const TreeAttentionTask& task, int64_t keys) : task_(task), a_(*task.args), S_(keys) {}

  void lay_out(Arena& arena) {
    ends_ = arena.take<int32_t>(S_);
    min_end_ = arena.take<int32_t>(S_ / kBlock);
    max_end_ = arena.take<int32_t>(S_ / kBlock);
    reach_ = arena.take<int32_t>(S_);
    min_reach_ = arena.take<int32_t>(S_ / kBlock);
    max_reach_ = arena.take<int32_t>(S_ / kBlock);
    causal_ = arena.take<bool>(S_ / kBlock);
  }

  void find() {
    find_ends();
    find_reach();
  }

  int32_t reach(int64_t i) const { return reach_[i]; }
  // Of the queries of the block that starts at i.
  int32_t max_reach(int64_t i) const { return max_reach_[i / kBlock]; }

  // Queries [i, i + kBlock) and keys [j, j + kBlock).
  Sight look(int64_t i, int64_t j) const {
    const int64_t last = (i + kBlock < task_.last_row ? i + kBlock : task_.last_row) - 1, rows = i / kBlock, keys = j / kBlock;
    Sight sight;
    sight.some = i < max_end_[keys] && j < max_reach_[rows];
    sight.some_end = last >= min_end_[keys];
    sight.some_reach = j + kBlock > min_reach_[rows];
    sight.diagonal = i == j && causal_[rows];
    return sight;
  }

  // Whether query i, which reaches `stop`, sees keys j and those after it: all ones in the lanes that it sees.
  Vec<int32_t> visible(int64_t i, int64_t j, int64_t stop, bool some_reach) const {
    Vec<int32_t> seen = load(ends_ + j) > static_cast<int32_t>(i);
    if (some_reach) {
      Vec<int32_t> index;
      for (int lane = 0; lane < kWidth; ++lane) index[lane] = lane;
      seen &= index < static_cast<int32_t>(stop - j);
    }
    return seen;
  }

 private:
  // ends_: tree_end of each key, and its extremes over blocks. Keys past the last one are seen by none.
  void find_ends() {
    for (int64_t j = 0; j < S_; ++j) {
      const bool real = j < task_.last_key;
      ends_[j] = !real ? 0 : a_.tree_end == nullptr ? static_cast<int32_t>(a_.S) : a_.tree_end[task_.batch * a_.S + j];
      const int64_t block = j / kBlock;
      if (j % kBlock == 0) min_end_[block] = max_end_[block] = ends_[j];
      if (real && ends_[j] < min_end_[block]) min_end_[block] = ends_[j];
      if (ends_[j] > max_end_[block]) max_end_[block] = ends_[j];
    }
  }

  // reach_: of each query, its extremes over blocks, and in which blocks each query reaches up to itself. Rows past the last one count for none.
  void find_reach() {
    for (int64_t i = 0; i < S_; ++i) {
      const bool real = i < task_.last_row;
      const int32_t itself = static_cast<int32_t>(i + 1), end = static_cast<int32_t>(a_.S);
      const int32_t given = a_.reach == nullptr || !real ? itself : a_.reach[task_.batch * a_.S + i];
      reach_[i] = given < end ? given : end;
      const int64_t block = i / kBlock;
      if (i % kBlock == 0) {
        min_reach_[block] = max_reach_[block] = real ? reach_[i] : 0;
        causal_[block] = true;
      }
      if (!real) continue;
      if (reach_[i] < min_reach_[block]) min_reach_[block] = reach_[i];
      if (reach_[i] > max_reach_[block]) max_reach_[block] = reach_[i];
      causal_[block] &= reach_[i] == itself;
    }
  }

  const TreeAttentionTask& task_;
  const TreeAttentionArgs& a_;
  const int64_t S_;
  int32_t *ends_, *min_end_, *max_end_, *reach_, *min_reach_, *max_reach_;
  bool* causal_;
};

}  // namespace
