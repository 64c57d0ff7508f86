// SPDX-License-Identifier: GPL-2.0
/*
 * The ledger of each vCPU, kept by BPF: for hosts that cannot load the module.
 *
 * The transitions are those of src/meter/ledger.rs, at the same places in KVM: the tracepoints kvm_exit and kvm_entry, and
 * kprobes where a vCPU takes a CPU and leaves it. The clock is bpf_ktime_get_ns(), so a tick is a nanosecond. Each ledger has
 * one writer at a time, the thread that holds the vCPU: nothing here is locked but what all vCPUs share, the totals.
 */
#include "ledger.h"

/* How KVM is laid out, and which half it is of: the loader sets these from the kernel's types (BTF). */
#define ABSENT 0xffffffff

volatile const u32 is_svm;
/* How many CPUs there can be: entries of `heres`. */
volatile const u32 cpus = 1;
/* Whether kvm_exit passes the reason before the vCPU (Linux before 5.17). */
volatile const u32 vcpu_is_second;
/* Whether no tracepoint tells that a vCPU is about to run a nested guest. */
volatile const u32 nests_always;

/* In struct task_struct. */
volatile const u32 task_on_rq;
volatile const u32 task_sched_delayed = ABSENT;
/* In struct kvm_vcpu. */
volatile const u32 vcpu_kvm;
volatile const u32 vcpu_id;
volatile const u32 vcpu_preempted;
volatile const u32 vcpu_scheduled_out = ABSENT;
volatile const u32 vcpu_guest_mode;
volatile const u32 vcpu_blocking;
volatile const u32 vcpu_poll_success;
volatile const u32 vcpu_poll_fail;
/* In struct kvm. */
volatile const u32 kvm_userspace_pid;
volatile const u32 kvm_stats_id;
volatile const u32 kvm_vm_type = ABSENT;
/* VMX: in struct vcpu_vmx, from its vCPU on. */
volatile const u32 vmx_exit_reason;
/* SVM: in struct vcpu_svm, from its vCPU on, and in struct vmcb. */
volatile const u32 svm_vmcb;
volatile const u32 svm_vmcb01;
volatile const u32 vmcb_exit_code;

/* Of a vCPU that runs unmetered. */
#define NONE 0xffffffff
/* KVM_X86_TDX_VM (arch/x86/include/uapi/asm/kvm.h). */
#define TRUST_DOMAIN 5

/* The vCPU that this CPU held last: its ledger is found without a hash. */
struct here {
	u64 vcpu;
	u64 vmcb;
	u32 index;
	u32 nests;
	/* kvm_sched_out() has begun, and the vCPU is not off the CPU yet: on kernels that do not tell it in the vCPU. */
	u32 scheduled_out;
} __attribute__((aligned(64)));

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct here);
} heres SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct ledger);
} ledgers SEC(".maps");

/* An empty ledger, to be copied. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct ledger);
} nothing SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct owner);
} owners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct totals);
} gone SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct meter);
} meter SEC(".maps");

/* The ledgers that no vCPU has; the loader fills it. */
struct {
	__uint(type, BPF_MAP_TYPE_STACK);
	__uint(max_entries, 1);
	__type(value, u32);
} unused SEC(".maps");

/* By address of the vCPU: which ledger it has, or NONE. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, u64);
	__type(value, u32);
} vcpus SEC(".maps");

struct vm {
	u64 number;
	/* Its vCPUs that have a ledger. */
	u64 metered;
};

/* By address of the VM. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, u64);
	__type(value, struct vm);
} vms SEC(".maps");

static __always_inline struct meter *the_meter(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&meter, &zero);
}

static __always_inline struct here *this_cpu(void)
{
	u32 cpu = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&heres, &cpu);
}

/* Return the cells of a row, or NULL if the number is none of a row. */
static __always_inline u64 *row_of(struct ledger *ledger, u32 row)
{
	forget(row);
	if (row > (SLOTS - 1) * ROW * sizeof(u64))
		return 0;
	return (u64 *)((char *)ledger->cells + row);
}

/* Begin a transition at @now, or a tick after the one before it; return its time. */
static __always_inline u64 begin_transition(struct ledger *ledger, u64 now)
{
	u64 last = ledger->last;

	if (unlikely(now <= last))
		now = last + 1;
	*(volatile u64 *)&ledger->begun = now;
	barrier();
	return now;
}

static __always_inline void end_transition(struct ledger *ledger, u64 now)
{
	barrier();
	*(volatile u64 *)&ledger->last = now;
}

/* Book @ticks of a phase on the latest reason. */
static __always_inline void book(struct ledger *ledger, u32 phase, u64 ticks)
{
	u64 *row;

	if (phase == WAITING) {
		u32 slot = ledger->row / (ROW * sizeof(u64));

		forget(slot);
		if (slot < SLOTS)
			ledger->waiting[slot] += ticks;
		return;
	}
	row = row_of(ledger, ledger->row);
	forget(phase);
	if (row && phase < WAITING)
		row[CYCLES + phase] += ticks;
}

/* Return the number of the VM, which gets one vCPU more. */
static __always_inline u64 number_of_vm(u64 kvm)
{
	struct vm first = { 0 };
	struct meter *meter;
	struct vm *vm = bpf_map_lookup_elem(&vms, &kvm);

	if (!vm) {
		meter = the_meter();
		if (!meter)
			return 0;
		first.number = __sync_fetch_and_add(&meter->vms, 1) + 1;
		bpf_map_update_elem(&vms, &kvm, &first, BPF_NOEXIST);
		vm = bpf_map_lookup_elem(&vms, &kvm);
		if (!vm)
			return 0;
	}
	__sync_fetch_and_add(&vm->metered, 1);
	return vm->number;
}

static __always_inline u64 polled_by(u64 vcpu)
{
	return read_kernel(u64, vcpu + vcpu_poll_success) + read_kernel(u64, vcpu + vcpu_poll_fail);
}

/* Give a vCPU a ledger, in which it is in @phase from @now on. Return which, or NONE. */
static __noinline u32 take_in(u64 vcpu, u64 now, u32 phase)
{
	u64 kvm = read_kernel(u64, vcpu + vcpu_kvm);
	struct meter *meter = the_meter();
	u32 index = NONE, none = NONE;
	struct ledger *ledger;
	struct owner *owner;
	int refused;

	refused = kvm_vm_type != ABSENT && read_kernel(u8, kvm + kvm_vm_type) == TRUST_DOMAIN;
	if (!refused)
		refused = bpf_map_pop_elem(&unused, &index) != 0;
	if (refused) {
		if (!bpf_map_update_elem(&vcpus, &vcpu, &none, BPF_NOEXIST) && meter)
			__sync_fetch_and_add(&meter->unmetered, 1);
		return NONE;
	}
	ledger = bpf_map_lookup_elem(&ledgers, &index);
	owner = bpf_map_lookup_elem(&owners, &index);
	if (!ledger || !owner)
		return NONE;
	if (bpf_map_update_elem(&vcpus, &vcpu, &index, BPF_NOEXIST)) {
		bpf_map_push_elem(&unused, &index, BPF_ANY);
		return NONE;
	}

	owner->vcpu = vcpu;
	owner->kvm = kvm;
	owner->vm = number_of_vm(kvm);
	owner->pid = read_kernel(u32, kvm + kvm_userspace_pid);
	owner->id = read_kernel(u32, vcpu + vcpu_id);
	bpf_probe_read_kernel(owner->name, sizeof(owner->name), (const void *)(kvm + kvm_stats_id));
	owner->polled_before = polled_by(vcpu);
	owner->polled = 0;
	owner->vmcb = is_svm ? read_kernel(u64, vcpu + svm_vmcb01) : 0;
	owner->nests = nests_always || read_kernel(u64, vcpu + vcpu_guest_mode) != 0;

	ledger->first = now;
	ledger->used[SLOT_START / 64] = 1ULL << (SLOT_START % 64);
	ledger->row = SLOT_START * ROW * sizeof(u64);
	ledger->phase = phase;
	ledger->carried = phase == GUEST ? 0 : CLOSED;
	*(volatile u64 *)&ledger->begun = now;
	end_transition(ledger, now);
	/* Who finds the generation odd finds all of it. */
	barrier();
	*(volatile u64 *)&owner->generation = owner->generation + 1;
	return index;
}

/* Return the ledger of a vCPU that this CPU did not hold last, or NONE. */
static __noinline u32 find(u64 vcpu, u64 now, u32 phase)
{
	u32 *known = bpf_map_lookup_elem(&vcpus, &vcpu);
	u32 index = known ? *known : take_in(vcpu, now, phase);
	struct here *here = this_cpu();
	struct owner *owner = bpf_map_lookup_elem(&owners, &index);

	if (!here || !owner)
		return NONE;
	here->index = index;
	here->vmcb = owner->vmcb;
	here->nests = owner->nests;
	here->vcpu = vcpu;
	return index;
}

/* Return the ledger of a vCPU that the caller holds, or NULL. One that is new is in @phase from @now on. */
static __always_inline struct ledger *ledger_of(struct here *here, u64 vcpu, u64 now, u32 phase)
{
	u32 index = here->index;

	if (unlikely(here->vcpu != vcpu))
		index = find(vcpu, now, phase);
	return bpf_map_lookup_elem(&ledgers, &index);
}

static __always_inline u32 slot_of(u32 code)
{
	if (!is_svm)
		code &= 0xffff;
	if (code < 168)
		return code;
	if (is_svm) {
		if (code - 0x400 < 4)
			return code - 0x400 + 168;
		if (code + 4 < 4)
			return code + 4 + 172;
	}
	return SLOT_OTHER;
}

/* A row's first exit: the row is in use, and has a histogram while there is one left. */
static __noinline int begin_row(struct ledger *ledger, u32 slot)
{
	u32 taken, word;

	if (!ledger || slot >= SLOTS)
		return 0;
	word = slot / 64;
	forget(word);
	if (word < WORDS)
		ledger->used[word] |= 1ULL << (slot % 64);
	taken = ledger->taken;
	if (taken < HISTOGRAMS) {
		ledger->taken = taken + 1;
		ledger->cells[slot * ROW + HISTOGRAM] = (u64)(taken + 1) * BUCKETS;
	}
	return 0;
}

static __noinline int lose_exit(void)
{
	struct meter *meter = the_meter();

	if (meter)
		__sync_fetch_and_add(&meter->lost_exits, 1);
	return 0;
}

SEC("raw_tracepoint/kvm_exit")
int on_exit(struct bpf_raw_tracepoint_args *args)
{
	u64 vcpu = vcpu_is_second ? args->args[1] : args->args[0];
	struct here *here = this_cpu();
	u64 now = bpf_ktime_get_ns();
	int nested = 0;
	struct ledger *ledger;
	u32 code, slot;
	u64 *row;

	if (!here)
		return 0;
	ledger = ledger_of(here, vcpu, now, GUEST);
	if (unlikely(!ledger))
		return lose_exit();
	if (is_svm) {
		u64 vmcb = read_kernel(u64, vcpu + svm_vmcb);

		code = read_kernel(u32, vmcb + vmcb_exit_code);
		nested = vmcb != here->vmcb;
	} else {
		code = read_kernel(u32, vcpu + vmx_exit_reason);
		if (unlikely(here->nests))
			nested = read_kernel(u64, vcpu + vcpu_guest_mode) != 0;
	}
	slot = slot_of(code);

	now = begin_transition(ledger, now);
	row = row_of(ledger, ledger->row);
	if (row)
		row[CYCLES + GUEST] += now - ledger->last;
	forget(slot);
	if (slot >= SLOTS)
		return 0;
	ledger->row = slot * (ROW * sizeof(u64));
	ledger->phase = KERNEL;
	row = &ledger->cells[slot * ROW];
	if (unlikely(nested))
		ledger->nested[slot]++;
	if (unlikely(!row[EXITS]++))
		begin_row(ledger, slot);
	end_transition(ledger, now);
	return 0;
}

/* As bucket() of src/meter/histogram.rs: two for each power of two, from 64 on. */
static __always_inline u32 bucket_of(u64 ticks)
{
	u64 rest = ticks;
	u32 power = 0;

	if (ticks < 96)
		return 0;
	if (unlikely(rest >> 32)) {
		rest >>= 32;
		power += 32;
	}
	if (unlikely(rest >> 16)) {
		rest >>= 16;
		power += 16;
	}
	if (rest >> 8) {
		rest >>= 8;
		power += 8;
	}
	if (rest >> 4) {
		rest >>= 4;
		power += 4;
	}
	if (rest >> 2) {
		rest >>= 2;
		power += 2;
	}
	if (rest >> 1)
		power += 1;
	/* The topmost bit and the one below it are 2 or 3. */
	power = power * 2 + (u32)(ticks >> (power - 1)) - 14;
	return power < BUCKETS ? power : BUCKETS - 1;
}

static __always_inline void sample(struct ledger *ledger, u64 *row, u64 ticks)
{
	u64 place;

	if (ticks > row[MAX])
		row[MAX] = ticks;
	place = row[HISTOGRAM] + bucket_of(ticks);
	forget(place);
	if (place < (1 + HISTOGRAMS) * BUCKETS)
		ledger->cells[ROWS + place]++;
}

SEC("raw_tracepoint/kvm_entry")
int on_entry(struct bpf_raw_tracepoint_args *args)
{
	struct here *here = this_cpu();
	u64 now = bpf_ktime_get_ns();
	struct ledger *ledger;
	u64 ticks, carried;
	u64 *row;

	if (!here)
		return 0;
	ledger = ledger_of(here, args->args[0], now, KERNEL);
	if (!ledger)
		return 0;
	now = begin_transition(ledger, now);
	ticks = now - ledger->last;
	row = row_of(ledger, ledger->row);
	if (!row)
		return 0;
	row[CYCLES + KERNEL] += ticks;
	ledger->phase = GUEST;
	carried = ledger->carried;
	if (unlikely(carried)) {
		ledger->carried = 0;
		ticks += carried;
	}
	if (carried != CLOSED)
		sample(ledger, row, ticks);
	end_transition(ledger, now);
	return 0;
}

/* The vCPU is on a CPU, in KVM: kvm_arch_vcpu_load(). */
SEC("kprobe/kvm_arch_vcpu_load")
int on_load(struct pt_regs *registers)
{
	struct here *here = this_cpu();
	u64 now = bpf_ktime_get_ns();
	struct ledger *ledger;

	if (!here)
		return 0;
	ledger = ledger_of(here, first_argument(registers), now, KERNEL);
	if (!ledger)
		return 0;
	now = begin_transition(ledger, now);
	book(ledger, ledger->phase, now - ledger->last);
	ledger->phase = KERNEL;
	end_transition(ledger, now);
	return 0;
}

/* Return true if the current task could run: as task_is_runnable() asks, and before Linux 6.12 kvm_sched_out(). */
static __always_inline int current_is_runnable(void)
{
	u64 task = bpf_get_current_task();

	/* An int before Linux 7.3, of which the low byte tells as much. */
	if (!read_kernel(u8, task + task_on_rq))
		return 0;
	return task_sched_delayed == ABSENT || !read_kernel(u8, task + task_sched_delayed);
}

/* The phase of a vCPU that the scheduler takes off its CPU: see phase_scheduled_out() in src/hooks.rs. */
static __always_inline u32 phase_scheduled_out(u64 vcpu)
{
	if (read_kernel(u8, vcpu + vcpu_preempted) || current_is_runnable())
		return PREEMPTED;
	return read_kernel(u64, vcpu + vcpu_blocking) ? HALTED : WAITING;
}

/* The vCPU leaves its CPU: kvm_arch_vcpu_put(). */
SEC("kprobe/kvm_arch_vcpu_put")
int on_put(struct pt_regs *registers)
{
	u64 vcpu = first_argument(registers);
	struct here *here = this_cpu();
	u64 now = bpf_ktime_get_ns();
	struct ledger *ledger;
	struct owner *owner;
	u64 ticks, carried;
	u32 phase, left;
	u32 index;
	int out;

	if (!here)
		return 0;
	ledger = ledger_of(here, vcpu, now, KERNEL);
	if (!ledger)
		return 0;
	if (vcpu_scheduled_out == ABSENT) {
		out = here->scheduled_out;
		here->scheduled_out = 0;
	} else {
		out = read_kernel(u8, vcpu + vcpu_scheduled_out);
	}
	phase = out ? phase_scheduled_out(vcpu) : USER;
	now = begin_transition(ledger, now);
	ticks = now - ledger->last;
	left = ledger->phase;
	book(ledger, left, ticks);
	ledger->phase = phase;
	carried = ledger->carried;
	if (left == GUEST)
		/* An entry that no exit has followed, as one that failed. */
		ledger->carried = CLOSED;
	else if (left == KERNEL && carried != CLOSED)
		ledger->carried = carried + ticks;
	end_transition(ledger, now);

	index = here->index;
	owner = bpf_map_lookup_elem(&owners, &index);
	if (owner)
		owner->polled = polled_by(vcpu) - owner->polled_before;
	return 0;
}

/* kvm_sched_out() begins, on kernels that do not tell it in the vCPU (Linux before 6.10): kvm_arch_vcpu_put() comes next. */
SEC("kprobe/kvm_sched_out")
int on_sched_out(struct pt_regs *registers)
{
	struct here *here = this_cpu();

	if (here)
		here->scheduled_out = 1;
	return 0;
}

/* VMX: the vCPU that this CPU holds is about to run a nested guest. */
SEC("raw_tracepoint/kvm_nested_vmenter")
int on_nested_entry(struct bpf_raw_tracepoint_args *args)
{
	struct here *here = this_cpu();
	struct owner *owner;
	u32 index;

	if (!here)
		return 0;
	here->nests = 1;
	index = here->index;
	owner = bpf_map_lookup_elem(&owners, &index);
	if (owner)
		owner->nests = 1;
	return 0;
}

static __always_inline void raise(u64 *to, u64 value)
{
	u64 before = *to;

	/* Another CPU may add a vCPU at the same time; each try that fails means that it has. */
#pragma unroll
	for (int tries = 0; tries < 8 && value > before; tries++)
		before = __sync_val_compare_and_swap(to, before, value);
}

struct folding {
	struct ledger *ledger;
	struct totals *totals;
	u32 slot;
	u64 place;
};

/* Add one bucket of a row's histogram to the totals: a body of bpf_loop(), as the one below. */
static long fold_bucket(u32 bucket, struct folding *folding)
{
	u64 place = folding->place + bucket;
	u32 slot = folding->slot;
	u64 samples;

	forget(place);
	forget(bucket);
	forget(slot);
	if (bucket >= BUCKETS || slot >= SLOTS || place >= (1 + HISTOGRAMS) * BUCKETS)
		return 1;
	samples = folding->ledger->cells[ROWS + place];
	if (samples)
		__sync_fetch_and_add(&folding->totals->histograms[slot][bucket], samples);
	return 0;
}

/* Add one row to the totals. */
static long fold_row(u32 slot, struct folding *folding)
{
	struct ledger *ledger = folding->ledger;
	u64 *from, *to;

	forget(slot);
	if (slot >= SLOTS)
		return 1;
	if (!(ledger->used[slot / 64] >> (slot % 64) & 1))
		return 0;
	from = &ledger->cells[slot * ROW];
	to = folding->totals->rows[slot];
	__sync_fetch_and_add(&to[0], from[EXITS]);
	__sync_fetch_and_add(&to[1], ledger->nested[slot]);
#pragma unroll
	for (u32 phase = 0; phase < WAITING; phase++)
		__sync_fetch_and_add(&to[2 + phase], from[CYCLES + phase]);
	__sync_fetch_and_add(&to[2 + WAITING], ledger->waiting[slot]);
	raise(&to[2 + PHASES], from[MAX]);
	folding->slot = slot;
	folding->place = from[HISTOGRAM];
	if (folding->place)
		bpf_loop(BUCKETS, fold_bucket, folding, 0);
	return 0;
}

/*
 * KVM destroys a vCPU, and will not load it again.
 *
 * Not at kvm_arch_vcpu_destroy(), which calls this last of all: in between VMX loads the vCPU (nested_vmx_free_vcpu()).
 */
SEC("kprobe/kvm_mmu_destroy")
int on_destroy(struct pt_regs *registers)
{
	u64 vcpu = first_argument(registers);
	u32 *known = bpf_map_lookup_elem(&vcpus, &vcpu);
	u32 zero = 0;
	struct totals *totals = bpf_map_lookup_elem(&gone, &zero);
	struct ledger *empty = bpf_map_lookup_elem(&nothing, &zero);
	struct folding folding = { 0 };
	struct ledger *ledger;
	struct owner *owner;
	struct vm *vm;
	u32 index;
	u64 kvm;

	if (!known || !totals || !empty)
		return 0;
	index = *known;
	bpf_map_delete_elem(&vcpus, &vcpu);
	for (u32 cpu = 0; cpu < cpus; cpu++) {
		u32 key = cpu;
		struct here *here = bpf_map_lookup_elem(&heres, &key);

		if (here && here->vcpu == vcpu)
			here->vcpu = 0;
	}
	ledger = bpf_map_lookup_elem(&ledgers, &index);
	owner = bpf_map_lookup_elem(&owners, &index);
	if (!ledger || !owner)
		return 0;

	/* A reader that finds another generation afterwards has found the vCPU in the totals as well. */
	folding.ledger = ledger;
	folding.totals = totals;
	__sync_fetch_and_add(&totals->begun, 1);
	bpf_loop(SLOTS, fold_row, &folding, 0);
	__sync_fetch_and_add(&totals->polled, polled_by(vcpu) - owner->polled_before);
	*(volatile u64 *)&owner->generation = owner->generation + 1;
	__sync_fetch_and_add(&totals->done, 1);
	kvm = owner->kvm;
	vm = bpf_map_lookup_elem(&vms, &kvm);
	if (vm && __sync_fetch_and_add(&vm->metered, -1) == 1)
		bpf_map_delete_elem(&vms, &kvm);
	bpf_probe_read_kernel(ledger, sizeof(*ledger), empty);
	bpf_map_push_elem(&unused, &index, BPF_ANY);
	return 0;
}

char gpl[] SEC("license") = "GPL";
