// SPDX-License-Identifier: GPL-2.0
/*
 * Count exits by reason and guest RIP in a hash, and with kvm_entry add up the time that they take.
 * This is the usual program to find the guest code that exits. Entries are never evicted.
 *
 * There is no variant on the raw tracepoint: it passes no RIP. On VMX, KVM reads the RIP for the event.
 */
#include "common.h"

struct code_key {
	__u64 rip;
	__u64 reason;
};

struct code_value {
	__u64 exits;
	__u64 time;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 10240);
	__type(key, struct code_key);
	__type(value, struct code_value);
} rows SEC(".maps");

struct start {
	struct code_key key;
	__u64 time;
};

/* The latest exit of each thread, until its entry. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 10240);
	__type(key, __u32);
	__type(value, struct start);
} starts SEC(".maps");

static __always_inline struct code_key key_of(const struct kvm_exit_event *event)
{
	struct code_key key = { .rip = event->guest_rip, .reason = event->exit_reason };

	return key;
}

static __always_inline void count(const struct code_key *key)
{
	struct code_value *row = bpf_map_lookup_elem(&rows, key);
	struct code_value first = { .exits = 1 };

	if (row)
		__sync_fetch_and_add(&row->exits, 1);
	else
		bpf_map_update_elem(&rows, key, &first, BPF_NOEXIST);
}

SEC("tracepoint/kvm/kvm_exit")
int kvm_exit(struct kvm_exit_event *event)
{
	struct code_key key = key_of(event);

	count(&key);
	return 0;
}

SEC("tracepoint/kvm/kvm_exit")
int kvm_exit_timed(struct kvm_exit_event *event)
{
	struct start start = { .key = key_of(event), .time = bpf_ktime_get_ns() };
	__u32 thread = bpf_get_current_pid_tgid();

	count(&start.key);
	bpf_map_update_elem(&starts, &thread, &start, BPF_ANY);
	return 0;
}

SEC("tracepoint/kvm/kvm_entry")
int kvm_entry(void *event)
{
	__u32 thread = bpf_get_current_pid_tgid();
	struct start *start;
	struct code_value *row;

	start = bpf_map_lookup_elem(&starts, &thread);
	if (!start || !start->time)
		return 0;
	row = bpf_map_lookup_elem(&rows, &start->key);
	if (row)
		__sync_fetch_and_add(&row->time, bpf_ktime_get_ns() - start->time);
	/* Cheaper than deleting it from the map, as many programs do. */
	start->time = 0;
	return 0;
}

char gpl[] SEC("license") = "GPL";
