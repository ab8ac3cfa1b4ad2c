// DirectReader::read_into: blocking reads into memory of any alignment, through two bounce buffers.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <limits>
#include <thread>
#include <utility>

#include "io/direct_read.h"
#include "io/errors.h"

namespace moe {

namespace {

constexpr int64_t kBufferBytes = kBounceBytes / 2;
constexpr int64_t kChunkBytes = kBufferBytes - 2 * kAlignment;  // its region fills the buffer; see Segment

}  // namespace

DirectReader::Chunk DirectReader::submit_chunk(const std::shared_ptr<Arena>& bounce, int64_t buffer,
                                               Segment segment) {
    segment.region = bounce->address() + buffer * kBufferBytes;
    std::lock_guard lock(state_->mutex);
    if (state_->closed) throw ConfigError("DirectReader.read_into: the reader is closed");
    const RequestPtr request = make_request({segment}, /*speculative=*/false);
    request->keep_alive = bounce;
    enqueue(request);
    return {request, segment};
}

void DirectReader::copy_chunk(const Chunk& chunk, std::byte* out,
                              const CheckInterrupt& check_interrupt) const {
    wait_for(chunk.request, std::numeric_limits<double>::infinity(), check_interrupt);
    check_interrupt();
    if (chunk.request->state != TicketState::kDone) {
        const auto& error = chunk.request->error;
        throw FileError(error ? error->error_number : ECANCELED, error ? error->message : kClosedText);
    }
    const auto* const first =
        reinterpret_cast<const std::byte*>(chunk.segment.region) + chunk.segment.offset % kAlignment;
    std::memcpy(out, first, static_cast<size_t>(chunk.segment.num_bytes));
}

void DirectReader::read_into(int64_t file_id, int64_t offset, int64_t num_bytes, std::byte* out,
                             const CheckInterrupt& check_interrupt) {
    check_usable();
    check_span("DirectReader.read_into", offset, num_bytes);
    std::unique_lock bounce_lock(state_->bounce_mutex, std::defer_lock);
    while (!bounce_lock.try_lock()) {
        // Another thread reads a tensor: rare (two models that load at once), so polling is enough.
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        check_interrupt();
    }
    // Taken, and given back at the end: after an exception reads may still be writing to the buffers,
    // which live as long as those reads; the next call makes new ones.
    std::shared_ptr<Arena> bounce = std::exchange(state_->bounce, nullptr);
    if (!bounce) bounce = std::make_shared<Arena>(kBounceBytes);

    std::deque<Chunk> chunks;  // one arrives while the other is copied out
    int64_t submitted = 0, buffer = 0;
    for (int64_t done = 0; done < num_bytes;) {
        while (chunks.size() < 2 && submitted < num_bytes) {
            const int64_t chunk_bytes = std::min(kChunkBytes, num_bytes - submitted);
            chunks.push_back(submit_chunk(bounce, buffer, {file_id, offset + submitted, chunk_bytes, 0}));
            submitted += chunk_bytes;
            buffer = 1 - buffer;
        }
        copy_chunk(chunks.front(), out + done, check_interrupt);
        done += chunks.front().segment.num_bytes;
        chunks.pop_front();
    }
    state_->bounce = std::move(bounce);
}

}  // namespace moe
