// Hammers the direct reader from several threads, for -fsanitize=thread and -fsanitize=address.
// stress_direct_read FILE ROUNDS: exits 0 when every byte arrived as the file has it.
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "io/arena.h"
#include "io/direct_read.h"
#include "io/errors.h"

using moe::Arena;
using moe::DirectReader;
using moe::Fault;
using moe::TicketState;

namespace {

constexpr int64_t kFileBytes = (5 << 20) + 321;
constexpr int64_t kMaxSpan = 3 << 20;
constexpr int kSpansPerRound = 4;

std::atomic<int> failures{0};

uint8_t byte_at(int64_t position) {
    return static_cast<uint8_t>((position * 2654435761u) >> 13);
}

void expect(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "failed: %s\n", what);
    ++failures;
}

void write_file(const std::string& path) {
    std::vector<uint8_t> bytes(kFileBytes);
    for (int64_t i = 0; i < kFileBytes; ++i) bytes[static_cast<size_t>(i)] = byte_at(i);
    std::FILE* file = std::fopen(path.c_str(), "wb");
    expect(file && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size(), "write");
    std::fclose(file);
}

bool same(const std::byte* bytes, int64_t offset, int64_t num_bytes) {
    for (int64_t i = 0; i < num_bytes; i += 97) {
        if (static_cast<uint8_t>(bytes[i]) != byte_at(offset + i)) return false;
    }
    return static_cast<uint8_t>(bytes[num_bytes - 1]) == byte_at(offset + num_bytes - 1);
}

struct Span {
    int64_t offset, num_bytes;
};

Span random_span(std::mt19937& rng) {
    const int64_t num_bytes = std::uniform_int_distribution<int64_t>(1, rng() % 4 ? 20000 : kMaxSpan)(rng);
    return {std::uniform_int_distribution<int64_t>(0, kFileBytes - num_bytes)(rng), num_bytes};
}

// Submits, promotes, cancels and waits at random; every finished read must have the right bytes.
void use_tickets(DirectReader& reader, int64_t file_id, unsigned seed, int rounds) {
    std::mt19937 rng(seed);
    const int64_t region_bytes = kMaxSpan + 8192;
    Arena arena(region_bytes * kSpansPerRound);
    for (int round = 0; round < rounds; ++round) {
        struct Read {
            Span span;
            int64_t region, ticket;
        };
        std::vector<Read> reads;
        for (int i = 0; i < kSpansPerRound; ++i) {
            const Span span = random_span(rng);
            const int64_t region = arena.address() + i * region_bytes;
            const auto ticket = reader.submit({{file_id, span.offset, span.num_bytes, region}}, rng() % 2);
            reads.push_back({span, region, ticket});
        }
        for (const Read& read : reads) {
            if (rng() % 3 == 0) reader.promote(read.ticket);
            const bool cancelled = rng() % 3 == 0 && reader.cancel(read.ticket);
            while (!reader.wait(read.ticket, 0.05, [] {})) {
            }
            const auto wanted = cancelled ? TicketState::kCancelled : TicketState::kDone;
            expect(reader.state(read.ticket) == wanted, "state");
            const auto* first = reinterpret_cast<const std::byte*>(read.region + read.span.offset % 4096);
            if (!cancelled) expect(same(first, read.span.offset, read.span.num_bytes), "bytes");
            expect(reader.forget(read.ticket), "forget");
        }
        reader.counters();
    }
}

void use_read_into(DirectReader& reader, int64_t file_id, unsigned seed, int rounds) {
    std::mt19937 rng(seed);
    std::vector<std::byte> out(kFileBytes);
    for (int round = 0; round < rounds; ++round) {
        const Span span = random_span(rng);
        reader.read_into(file_id, span.offset, span.num_bytes, out.data(), [] {});
        expect(same(out.data(), span.offset, span.num_bytes), "read_into");
    }
    // An interrupted caller may free its memory at once, while its pieces are still being read.
    auto doomed = std::make_unique<std::vector<std::byte>>(kFileBytes);
    try {
        reader.read_into(file_id, 0, kFileBytes, doomed->data(),
                         [] { throw std::runtime_error("interrupt"); });
    } catch (const std::runtime_error&) {
    }
    doomed.reset();
}

// Faults come and the file falls back to buffered reads in the middle of it all.
void disturb(DirectReader& reader) {
    reader.inject({Fault::Kind::kDelay, 20, 50, 0, 0.001, 0, ""});
    reader.inject({Fault::Kind::kShort, 30, 50, 0, 0, 6000, ""});
    reader.inject({Fault::Kind::kPreadDirect, 150, 1, EINVAL, 0, 0, ""});
}

void run(const std::string& path, const std::string& io_mode, bool is_disturbed, int rounds) {
    DirectReader reader(3, io_mode);
    const int64_t file_id = reader.add_file(path);
    std::vector<std::thread> users;
    for (unsigned seed = 0; seed < 2; ++seed) {
        users.emplace_back([&, seed] { use_tickets(reader, file_id, seed, rounds); });
    }
    users.emplace_back([&] { use_read_into(reader, file_id, 7, rounds); });
    if (is_disturbed) users.emplace_back([&] { disturb(reader); });
    for (std::thread& user : users) user.join();
}

// close() while reads hang, are queued, and somebody waits.
void run_close(const std::string& path) {
    Arena arena(1 << 20);
    DirectReader reader(2, "direct");
    const int64_t file_id = reader.add_file(path);
    reader.inject({Fault::Kind::kHang, 3, -1, 0, 0, 0, ""});
    std::vector<int64_t> tickets;
    for (int i = 0; i < 20; ++i) {
        tickets.push_back(reader.submit({{file_id, i * 5000, 100, arena.address() + i * 8192}}, i % 2));
    }
    std::thread waiter([&] {
        for (const int64_t ticket : tickets) reader.wait(ticket, 60, [] {});
    });
    std::thread second([&] { reader.close(); });
    reader.close();
    waiter.join();
    second.join();
    for (const int64_t ticket : tickets) expect(reader.state(ticket) >= TicketState::kDone, "closed");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    const std::string path = argv[1];
    write_file(path);
    for (const char* io_mode : {"direct", "threads", "buffered"}) {
        for (const bool is_disturbed : {false, true}) run(path, io_mode, is_disturbed, std::atoi(argv[2]));
    }
    run_close(path);
    return failures ? 1 : 0;
}
