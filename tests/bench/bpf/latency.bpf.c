// SPDX-License-Identifier: GPL-2.0
/*
 * Record the time from exit to entry in a log2 histogram by reason, as bcc's tools and bpftrace's
 * one-liners do. The exit stores its time under the thread's number, and the entry reads it.
 */
#include "common.h"

#define SLOTS 64

struct start {
	__u64 time;
	__u32 reason;
	__u32 open;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 10240);
	__type(key, __u32);
	__type(value, struct start);
} starts SEC(".maps");

struct histogram {
	__u64 slots[SLOTS];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct histogram);
} histograms SEC(".maps");

static const struct histogram empty;

static __always_inline __u32 log2_of(__u64 value)
{
	__u32 slot = 0;

#pragma unroll
	for (int shift = 32; shift; shift >>= 1) {
		if (value >> shift) {
			value >>= shift;
			slot += shift;
		}
	}
	return slot;
}

static __always_inline int begin(__u32 reason)
{
	struct start start = { .time = bpf_ktime_get_ns(), .reason = reason, .open = 1 };
	__u32 thread = bpf_get_current_pid_tgid();

	bpf_map_update_elem(&starts, &thread, &start, BPF_ANY);
	return 0;
}

static __always_inline int end(void)
{
	__u32 thread = bpf_get_current_pid_tgid();
	struct histogram *histogram;
	struct start *start;
	__u32 slot;

	start = bpf_map_lookup_elem(&starts, &thread);
	if (!start || !start->open)
		return 0;
	/* Cheaper than deleting it from the map, as many programs do. */
	start->open = 0;
	histogram = bpf_map_lookup_elem(&histograms, &start->reason);
	if (!histogram) {
		bpf_map_update_elem(&histograms, &start->reason, &empty, BPF_NOEXIST);
		histogram = bpf_map_lookup_elem(&histograms, &start->reason);
		if (!histogram)
			return 0;
	}
	slot = log2_of(bpf_ktime_get_ns() - start->time);
	__sync_fetch_and_add(&histogram->slots[slot & (SLOTS - 1)], 1);
	return 0;
}

SEC("tracepoint/kvm/kvm_exit")
int kvm_exit(struct kvm_exit_event *event)
{
	return begin(event->exit_reason);
}

SEC("tracepoint/kvm/kvm_entry")
int kvm_entry(void *event)
{
	return end();
}

SEC("raw_tracepoint/kvm_exit")
int kvm_exit_raw(struct bpf_raw_tracepoint_args *args)
{
	return begin(reason_of((const void *)args->args[0]));
}

SEC("raw_tracepoint/kvm_entry")
int kvm_entry_raw(struct bpf_raw_tracepoint_args *args)
{
	return end();
}

char gpl[] SEC("license") = "GPL";
