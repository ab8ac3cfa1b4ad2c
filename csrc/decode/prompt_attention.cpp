#include "decode/prompt_attention.h"

#include <algorithm>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/thread_pool.h"
#include "decode/cached_attention.h"
#include "decode/packed_cache.h"
#include "decode/token_kernels.h"

namespace moe {

namespace {

constexpr int64_t kBlockRows = 64;  // queries of a block, unless a token alone has more

int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

struct Prompt {
    const DecoderShape& shape;
    const AttentionLayer& attention;
    const CachedTokens& cached;
    int64_t num_tokens;
    const float* query;
    float* context;
};

// Queries of ``heads`` heads of one key/value head and of some tokens, one row each, by token and head.
class Block {
  public:
    Block(const Prompt& prompt, int64_t kv_head, int64_t first_head, int64_t num_heads, int64_t first_token,
          int64_t num_tokens)
        : prompt_(prompt),
          kv_head_(kv_head),
          first_head_(first_head),
          num_heads_(num_heads),
          first_token_(first_token),
          num_tokens_(num_tokens) {
        const int64_t rows = round_up(num_tokens * num_heads, kRowsAtOnce);
        const int64_t head_dim = prompt.shape.head_dim, padded_dim = round_up(head_dim, 16);
        const int64_t sizes[] = {kRangeTokens * head_dim,
                                 kRangeTokens * padded_dim,
                                 rows * kRangeTokens,
                                 rows * padded_dim,
                                 rows * padded_dim,
                                 rows,
                                 rows};
        int64_t total = 0;
        for (int64_t size : sizes) total += round_up(size, 16);
        float* memory = reinterpret_cast<float*>(thread_scratch(total * sizeof(float)));
        float* places[7];
        for (int i = 0; i < 7; memory += round_up(sizes[i++], 16)) places[i] = memory;
        keys_ = places[0];
        values_ = places[1];
        block_ = {rows,    head_dim,  padded_dim, queries_,  rows_,     tiles_,   keys_,
                  values_, places[2], places[3],  places[5], places[6], places[4]};
    }

    void attend() {
        place_rows();
        const int64_t position = prompt_.cached.num_tokens + first_token_;
        const int64_t first = first_seen(position, prompt_.attention.window), end = position + num_tokens_;
        for (int64_t base = first / kRangeTokens * kRangeTokens; base < end; base += kRangeTokens) {
            const int64_t from = std::max(base, first / 8 * 8);
            unpack(from, std::min(end, base + kRangeTokens) - from);
            see(from, base + kRangeTokens);
            token_kernels().attend_block(block_);
        }
        finish();
    }

  private:
    int64_t head_of(int64_t row) const { return first_head_ + row % num_heads_; }
    int64_t offset_of(int64_t row) const {
        return ((first_token_ + row / num_heads_) * prompt_.shape.num_heads + head_of(row)) * block_.head_dim;
    }

    // Rows beyond the last see nothing.
    void place_rows() {
        const float* sinks = prompt_.attention.sinks;
        const int64_t num_rows = num_tokens_ * num_heads_;
        std::fill_n(block_.out, block_.num_rows * block_.padded_dim, 0.0f);
        for (int64_t row = 0; row < block_.num_rows; ++row) {
            queries_[row] = prompt_.query + offset_of(std::min(row, num_rows - 1));
            rows_[row] = {0, 0};
            block_.max[row] = sinks ? sinks[head_of(row)] : -__builtin_inff();
            block_.sum[row] = sinks ? 1.0f : 0.0f;
        }
    }

    void unpack(int64_t from, int64_t count) {
        const auto& [shape, attention, cached, num_tokens, query, context] = prompt_;
        const int64_t row_bytes = cached_row_bytes(shape.cache_type, shape.head_dim);
        const int64_t offset = (kv_head_ * cached.capacity + from) * row_bytes;
        cache_kernels(shape.cache_type)
            .unpack(cached.keys + offset, cached.values + offset, row_bytes, count, shape.head_dim,
                    block_.padded_dim, keys_, values_);
    }

    // What each row sees of the tokens [from, end).
    void see(int64_t from, int64_t end) {
        for (int64_t row = 0; row < num_tokens_ * num_heads_; ++row) {
            const int64_t position = prompt_.cached.num_tokens + first_token_ + row / num_heads_;
            const int64_t first = std::max(from, first_seen(position, prompt_.attention.window));
            const int64_t last = std::min(end, position + 1);
            rows_[row] = first < last ? Seen{int32_t(first - from), int32_t(last - from)} : Seen{0, 0};
        }
        for (int64_t tile = 0; tile < block_.num_rows / kRowsAtOnce; ++tile) {
            Seen any = {int32_t(kRangeTokens), 0};
            for (const Seen* row = rows_ + tile * kRowsAtOnce; row < rows_ + (tile + 1) * kRowsAtOnce; ++row)
                if (row->first < row->end)
                    any = {std::min(any.first, row->first), std::max(any.end, row->end)};
            tiles_[tile] = any;
        }
    }

    void finish() {
        for (int64_t row = 0; row < num_tokens_ * num_heads_; ++row) {
            const float inverse = 1.0f / block_.sum[row];
            const float* out = block_.out + row * block_.padded_dim;
            float* context = prompt_.context + offset_of(row);
            for (int64_t i = 0; i < block_.head_dim; ++i) context[i] = out[i] * inverse;
        }
    }

    const Prompt& prompt_;
    int64_t kv_head_, first_head_, num_heads_, first_token_, num_tokens_;
    float *keys_, *values_;
    const float* queries_[kMaxBlockRows];
    Seen rows_[kMaxBlockRows], tiles_[kMaxBlockRows / kRowsAtOnce];
    QueryBlock block_;
};

}  // namespace

void attend_prompt(const DecoderShape& shape, const AttentionLayer& attention, const CachedTokens& cached,
                   int64_t num_tokens, const float* query, float* context) {
    const Prompt prompt{shape, attention, cached, num_tokens, query, context};
    const int64_t group = shape.num_heads / shape.num_kv_heads;
    const int64_t heads = std::min<int64_t>(group, kMaxBlockRows), parts = (group + heads - 1) / heads;
    const int64_t tokens = std::max<int64_t>(1, kBlockRows / heads);
    const int64_t num_blocks = (num_tokens + tokens - 1) / tokens;
    ThreadPool::instance().run(num_blocks * shape.num_kv_heads * parts, [&](int64_t chunk) {
        const int64_t first_token = (num_blocks - 1 - chunk / (shape.num_kv_heads * parts)) * tokens;
        const int64_t part = chunk % parts, kv_head = chunk / parts % shape.num_kv_heads;
        Block(prompt, kv_head, kv_head * group + part * heads, std::min(heads, group - part * heads),
              first_token, std::min(tokens, num_tokens - first_token))
            .attend();
    });
}

}  // namespace moe
