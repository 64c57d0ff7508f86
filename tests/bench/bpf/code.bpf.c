// SPDX-License-Identifier: GPL-2.0
/*
 * Counts exits by reason and guest RIP in a hash, and with kvm_entry the time that each took: what
 * one writes to learn which code of a guest exits. Rows are made once, and never make room.
 *
 * On the event alone: a raw tracepoint passes no RIP, and on VMX KVM reads it for the event.
 */
#include "common.h"

struct place {
	__u64 rip;
	__u64 reason;
};

struct row {
	__u64 exits;
	__u64 time;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 10240);
	__type(key, struct place);
	__type(value, struct row);
} rows SEC(".maps");

struct start {
	struct place place;
	__u64 time;
};

/* The exit that has not been followed by an entry, by thread. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 10240);
	__type(key, __u32);
	__type(value, struct start);
} starts SEC(".maps");

static __always_inline struct place place_of(const struct kvm_exit_event *event)
{
	struct place place = { .rip = event->guest_rip, .reason = event->exit_reason };

	return place;
}

static __always_inline void count(const struct place *place)
{
	struct row *row = bpf_map_lookup_elem(&rows, place);
	struct row first = { .exits = 1 };

	if (row)
		__sync_fetch_and_add(&row->exits, 1);
	else
		bpf_map_update_elem(&rows, place, &first, BPF_NOEXIST);
}

SEC("tracepoint/kvm/kvm_exit")
int kvm_exit(struct kvm_exit_event *event)
{
	struct place place = place_of(event);

	count(&place);
	return 0;
}

SEC("tracepoint/kvm/kvm_exit")
int kvm_exit_timed(struct kvm_exit_event *event)
{
	struct start start = { .place = place_of(event), .time = bpf_ktime_get_ns() };
	__u32 thread = bpf_get_current_pid_tgid();

	count(&start.place);
	bpf_map_update_elem(&starts, &thread, &start, BPF_ANY);
	return 0;
}

SEC("tracepoint/kvm/kvm_entry")
int kvm_entry(void *event)
{
	__u32 thread = bpf_get_current_pid_tgid();
	struct start *start;
	struct row *row;

	start = bpf_map_lookup_elem(&starts, &thread);
	if (!start || !start->time)
		return 0;
	row = bpf_map_lookup_elem(&rows, &start->place);
	if (row)
		__sync_fetch_and_add(&row->time, bpf_ktime_get_ns() - start->time);
	/* Cheaper than to take it out of the map, as many do. */
	start->time = 0;
	return 0;
}

char gpl[] SEC("license") = "GPL";
