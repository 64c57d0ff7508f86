// SPDX-License-Identifier: GPL-2.0
/*
 * BPF programs that keep the ledger of each vCPU, for hosts that cannot load the module.
 *
 * The transitions are those of src/meter/ledger.rs, at the same places in KVM: the tracepoints kvm_exit and kvm_entry, and
 * kprobes where a vCPU takes a CPU and leaves it. The clock is bpf_ktime_get_ns(), so a tick is a nanosecond. Each ledger has
 * one writer at a time, the thread that holds the vCPU. Only the data that all vCPUs share, such as the totals, needs locked
 * instructions.
 */
#include "ledger.h"
#include "tables.h"

/* Index of a vCPU that runs unmetered. */
#define NONE 0xffffffff
/* KVM_X86_TDX_VM (arch/x86/include/uapi/asm/kvm.h). */
#define TRUST_DOMAIN 5

/* Cache of the vCPU that this CPU held last. It saves the hash look-up of the ledger. */
struct here {
	/* Address of the vCPU, with flags in its low bits, so that the usual case is a single comparison. */
	u64 vcpu;
	u64 vmcb;
	/* Offset of its ledger, in bytes. */
	u32 ledger;
	/* Index of its ledger. */
	u32 index;
	/* True from kvm_sched_out() until the vCPU is off the CPU, on kernels without the vCPU's field scheduled_out. */
	u32 scheduled_out;
} __attribute__((aligned(64)));

/* Flag beside the address. VMX: the vCPU may run a nested guest. */
#define NESTS 1ULL
/* Flag beside the address: the vCPU has no ledger. */
#define UNMETERED 2ULL
#define FLAGS (NESTS | UNMETERED)

/*
 * Each hot array is a single value, whose size the loader sets. The programs have its address as a constant, while a look-up
 * of an entry would take some fifteen instructions.
 */

/* Caches, one for each CPU. Their number is a power of two. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct here);
} cpus SEC(".maps");

/* Ledgers, one for each vCPU that can be metered. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct ledger);
} ledgers SEC(".maps");

/* Table of bucket() in src/meter/histogram.rs. The loader fills it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u8[BUCKET_STEPS * BUCKET_STEP]);
} buckets SEC(".maps");

/* Empty ledger, to be copied. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct ledger);
} empty_ledger SEC(".maps");

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
} departed SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct meter);
} meter SEC(".maps");

/* Indices of the ledgers that no vCPU has. The loader fills it. */
struct {
	__uint(type, BPF_MAP_TYPE_STACK);
	__uint(max_entries, 1);
	__type(value, u32);
} unused SEC(".maps");

/* Index of a vCPU's ledger, or NONE, by the vCPU's address. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, u64);
	__type(value, u32);
} vcpus SEC(".maps");

struct vm {
	u64 number;
	/* Number of its vCPUs with a ledger. */
	u64 metered;
};

/* VMs, by their address. */
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

static __always_inline struct here *here_of(u64 cpu)
{
	mask_by(cpu, cpu_mask);
	return (struct here *)(value_of(&cpus) + cpu * sizeof(struct here));
}

static __always_inline struct here *this_cpu(void)
{
	return here_of(bpf_get_smp_processor_id());
}

/*
 * Return the ledger at an offset in bytes. The mask changes no valid offset. It proves to the verifier that the access is in
 * bounds.
 */
static __always_inline struct ledger *ledger_at(u64 place)
{
	char *ledger;

	mask_by(place, ledgers_mask);
	ledger = value_of(&ledgers) + place;
	/* Force the addition here, which frees the register of the offset. */
	asm volatile("" : "+r"(ledger));
	return (struct ledger *)ledger;
}

/* A row of a ledger, preceded by the fields before the cells. */
struct row {
	char before[offsetof(struct ledger, rows)];
	u64 cells[ROW];
};

/*
 * The place of a row is a multiple of 64 below ROWS * 64. The mask changes no such number. It proves to the verifier that the
 * row is within the ledger.
 */
#define mask_of_rows(place) asm volatile("%0 &= 0xfc0" : "+r"(place))

/* Return the row at a place. */
static __always_inline struct row *row_at(struct ledger *ledger, u64 place)
{
	mask_of_rows(place);
	/* Put the sum into the register of the place. The compiler would copy the ledger's register. */
	asm volatile("%0 += %1" : "+r"(place) : "r"(ledger));
	return (struct row *)place;
}

/* Return the number of the row at a place: below ROWS, and the verifier sees that it is below 64. */
static __always_inline u64 row_number(u64 place)
{
	mask_of_rows(place);
	return place / (ROW * sizeof(u64));
}

/* Begin a transition at @now, or one tick after @last if the clock did not advance. Return its time. */
static __always_inline u64 begin_transition(struct ledger *ledger, u64 now, u64 last)
{
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
	if (phase == WAITING) {
		u64 number = row_number(ledger->row);

		forget(number);
		if (number < ROWS)
			ledger->waiting[number] += ticks;
		return;
	}
	forget(phase);
	if (phase < WAITING)
		row_at(ledger, ledger->row)->cells[CYCLES + phase] += ticks;
}

/* Give a slot the row with a number, which is the next one; return its place. */
static __always_inline u64 add_row(struct ledger *ledger, u64 number, u64 slot)
{
	u64 place = number * (ROW * sizeof(u64));

	/* Row 0 is that of SLOT_START, for which nothing exits. The samples of the last ones are nobody's. */
	row_at(ledger, place)->cells[HISTOGRAM] = number <= HISTOGRAMS ? number * BUCKETS : 0;
	forget(number);
	forget(slot);
	if (number < ROWS)
		ledger->slots[number] = slot;
	if (slot < SLOTS)
		ledger->places[slot] = place;
	barrier();
	*(volatile u32 *)&ledger->taken = number + 1;
	return place;
}

/*
 * Return the place of the row in which the first exit of a slot is counted: a new one of its own, or that of SLOT_OTHER when
 * there is none left.
 */
static __always_inline u64 take_row(struct ledger *ledger, u64 slot)
{
	u64 other = ledger->places[SLOT_OTHER];
	u64 taken = ledger->taken;

	/* The last row is kept for SLOT_OTHER. */
	if (taken + (!other && slot != SLOT_OTHER) < ROWS)
		return add_row(ledger, taken, slot);
	if (!other)
		other = add_row(ledger, taken, SLOT_OTHER);
	forget(slot);
	if (slot < SLOTS)
		ledger->places[slot] = other;
	return other;
}

/* Return the slot in whose row an exit of a slot is counted: see take_row(). */
static __always_inline u64 counted_as(struct ledger *ledger, u64 slot)
{
	u64 place = ledger->places[slot];

	if (place)
		return ledger->slots[row_number(place)];
	return ledger->taken + !ledger->places[SLOT_OTHER] < ROWS ? slot : SLOT_OTHER;
}

/* Count one vCPU more for a VM, and return the VM's number. */
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
	return read_kernel(u64, vcpu + known(vcpu_poll_success)) + read_kernel(u64, vcpu + known(vcpu_poll_fail));
}

/* Give a vCPU a ledger that begins now in @phase. Return its index, or NONE. */
static __noinline u32 take_in(u64 vcpu, u32 phase)
{
	u64 now = bpf_ktime_get_ns();
	u64 kvm = read_kernel(u64, vcpu + known(vcpu_kvm));
	struct meter *meter = the_meter();
	u32 index = NONE, none = NONE;
	struct ledger *ledger;
	struct owner *owner;
	int refused;

	refused = known(kvm_vm_type) != ABSENT && read_kernel(u8, kvm + known(kvm_vm_type)) == TRUST_DOMAIN;
	if (!refused)
		refused = bpf_map_pop_elem(&unused, &index) != 0;
	if (refused) {
		if (!bpf_map_update_elem(&vcpus, &vcpu, &none, BPF_NOEXIST) && meter)
			__sync_fetch_and_add(&meter->unmetered, 1);
		return NONE;
	}
	ledger = ledger_at((u64)index * sizeof(struct ledger));
	owner = bpf_map_lookup_elem(&owners, &index);
	if (!owner)
		return NONE;
	if (bpf_map_update_elem(&vcpus, &vcpu, &index, BPF_NOEXIST)) {
		bpf_map_push_elem(&unused, &index, BPF_ANY);
		return NONE;
	}

	owner->vcpu = vcpu;
	owner->kvm = kvm;
	owner->vm = number_of_vm(kvm);
	owner->pid = read_kernel(u32, kvm + known(kvm_userspace_pid));
	owner->id = read_kernel(u32, vcpu + known(vcpu_id));
	bpf_probe_read_kernel(owner->name, sizeof(owner->name), (const void *)(kvm + known(kvm_stats_id)));
	owner->polled_before = polled_by(vcpu);
	owner->polled = 0;
	owner->vmcb = known(is_svm) ? read_kernel(u64, vcpu + known(svm_vmcb01)) : 0;
	owner->nests = known(nests_always) || read_kernel(u64, vcpu + known(vcpu_guest_mode)) != 0;

	ledger->first = now;
	ledger->row = add_row(ledger, 0, SLOT_START);
	ledger->phase = phase;
	ledger->carried = phase == GUEST ? 0 : CLOSED;
	*(volatile u64 *)&ledger->begun = now;
	end_transition(ledger, now);
	/* A reader that finds the generation odd also finds everything above. */
	barrier();
	*(volatile u64 *)&owner->generation = owner->generation + 1;
	return index;
}

/* Put a vCPU into this CPU's cache. A new vCPU begins in @phase. */
static __noinline int find(u64 vcpu, u32 phase)
{
	u32 *had = bpf_map_lookup_elem(&vcpus, &vcpu);
	u32 index = had ? *had : take_in(vcpu, phase);
	struct here *here = this_cpu();
	struct owner *owner = bpf_map_lookup_elem(&owners, &index);

	here->index = index;
	/* The verifier takes the address for a pointer, which allows addition only. */
	if (!owner) {
		here->vcpu = vcpu + UNMETERED;
		return 0;
	}
	here->ledger = index * sizeof(struct ledger);
	here->vmcb = owner->vmcb;
	here->vcpu = owner->nests ? vcpu + NESTS : vcpu;
	return 0;
}

/* Return this CPU's cache with a vCPU that the caller holds. A new vCPU begins in @phase. */
static __always_inline struct here *here_with(u64 vcpu, u32 phase)
{
	struct here *here = this_cpu();

	if (likely((here->vcpu & ~FLAGS) == vcpu))
		return here;
	find(vcpu, phase);
	return this_cpu();
}

/* Return the slot of an exit code. The verifier sees that it is below 256. */
static __always_inline u64 slot_of(u64 code, int is_svm)
{
	u64 slot = SLOT_OTHER;

	if (likely(code < 168))
		return code;
	if (is_svm) {
		if (code - 0x400 < 4)
			slot = code - 0x400 + 168;
		else if (code + 4 - (1ULL << 32) < 4)
			slot = code + 4 - (1ULL << 32) + 172;
		asm volatile("%0 &= 0xff" : "+r"(slot));
		return slot;
	}
	/* A failed entry sets a bit above the reason. */
	code &= 0xffff;
	return code < 168 ? code : SLOT_OTHER;
}

static __always_inline void count_nested(struct ledger *ledger, u64 place)
{
	u64 number = row_number(place);

	forget(number);
	if (number < ROWS)
		ledger->nested[number]++;
}

static __noinline int lose_exit(void)
{
	struct meter *meter = the_meter();

	if (meter)
		__sync_fetch_and_add(&meter->lost_exits, 1);
	return 0;
}

/* End the guest's time at @now, and begin the kernel's, for the reason whose row is at @place. */
static __always_inline int leave_guest_at(struct ledger *ledger, u64 place, u64 now, int nested)
{
	u64 last = ledger->last;

	now = begin_transition(ledger, now, last);
	row_at(ledger, ledger->row)->cells[CYCLES + GUEST] += now - last;
	ledger->phase = KERNEL;
	ledger->row = place;
	if (nested)
		count_nested(ledger, place);
	row_at(ledger, place)->cells[EXITS]++;
	end_transition(ledger, now);
	return 0;
}

/* The same for the first exit of a slot. */
static __noinline int leave_guest_first(struct ledger *ledger, u64 slot, u64 now, int nested)
{
	u64 last = ledger->last;

	/* What a reader copies is written within the transition. */
	now = begin_transition(ledger, now, last);
	return leave_guest_at(ledger, take_row(ledger, slot), now, nested);
}

/* The same for any exit of a slot. */
static __always_inline int leave_guest(struct ledger *ledger, u64 slot, u64 now, int nested)
{
	u64 place = ledger->places[slot];

	if (unlikely(!place))
		return leave_guest_first(ledger, slot, now, nested);
	return leave_guest_at(ledger, place, now, nested);
}

/*
 * SVM: take an exit whose tracepoint came late. Up to at least Linux 6.1 KVM calls it after interrupts and preemption are on
 * again, so the vCPU may have left its CPU and come back since the guest's time ended. The time since then is the kernel's,
 * and the exit counts once.
 */
static __noinline int leave_late(struct ledger *ledger, u64 slot, u64 now, int nested)
{
	u64 last = ledger->last;

	now = begin_transition(ledger, now, last);
	row_at(ledger, ledger->row)->cells[CYCLES + KERNEL] += now - last;
	ledger->carried = 0;
	end_transition(ledger, now);
	return leave_guest(ledger, slot, now, nested);
}

/* Return the exit reason from the hardware. On SVM also set @vmcb to the VMCB that has it. */
static __always_inline u32 exit_code(u64 vcpu, int is_svm, int can_cast, u64 *vmcb)
{
	if (!is_svm)
		return read_by(can_cast, u32, vcpu + known(vmx_exit_reason));
	*vmcb = read_by(can_cast, u64, vcpu + known(svm_vmcb));
	return read_by(can_cast, u32, *vmcb + known(vmcb_exit_code));
}

/* Return true if a nested guest exited. @vmcb comes from exit_code(). */
static __always_inline int is_nested(const struct here *here, u64 vcpu, u64 vmcb, int is_svm)
{
	if (is_svm)
		return vmcb != here->vmcb;
	return here->vcpu & NESTS && read_kernel(u64, vcpu + known(vcpu_guest_mode));
}

/* Slow path of an exit: the vCPU is not in this CPU's cache, or it runs nested guests. */
static __always_inline int leave_slowly(u64 vcpu, u64 now, int is_svm)
{
	struct here *here = here_with(vcpu, GUEST);
	struct ledger *ledger = ledger_at(here->ledger);
	u64 vmcb = 0, slot;
	int nested;

	if (here->vcpu & UNMETERED)
		return lose_exit();
	slot = slot_of(exit_code(vcpu, is_svm, known(can_cast) != 0, &vmcb), is_svm);
	nested = is_nested(here, vcpu, vmcb, is_svm);
	if (is_svm && ledger->phase != GUEST)
		return leave_late(ledger, slot, now, nested);
	return leave_guest(ledger, slot, now, nested);
}

static __noinline int leave_slowly_vmx(u64 vcpu, u64 now)
{
	return leave_slowly(vcpu, now, 0);
}

static __noinline int leave_slowly_svm(u64 vcpu, u64 now)
{
	return leave_slowly(vcpu, now, 1);
}

static __noinline int leave_nested(struct ledger *ledger, u64 slot, u64 now)
{
	return leave_guest(ledger, slot, now, 1);
}

/*
 * Handle an exit. Rare cases end in tail functions, so the usual path saves few registers. Each way to read the reason has its
 * own program, because even a condition that the verifier decides leaves an instruction.
 */
static __always_inline int leave_vmx(struct bpf_raw_tracepoint_args *args, int can_cast)
{
	u64 vcpu = first_of(args);
	u64 now = bpf_ktime_get_ns();
	struct here *here = this_cpu();
	struct ledger *ledger;
	u64 reason;

	if (unlikely(here->vcpu != vcpu))
		return leave_slowly_vmx(vcpu, now);
	/* Computed first, so that the ledger takes the vCPU's register: each register in use is saved and restored. */
	reason = vcpu + known(vmx_exit_reason);
	forget(reason);
	ledger = ledger_at(here->ledger);
	return leave_guest(ledger, slot_of(read_by(can_cast, u32, reason), 0), now, 0);
}

static __always_inline int leave_svm(struct bpf_raw_tracepoint_args *args, int can_cast)
{
	u64 vcpu = first_of(args);
	u64 now = bpf_ktime_get_ns();
	struct here *here = this_cpu();
	struct ledger *ledger;
	u64 own, vmcb, slot;

	if (unlikely(here->vcpu != vcpu))
		return leave_slowly_svm(vcpu, now);
	own = here->vmcb;
	ledger = ledger_at(here->ledger);
	slot = slot_of(exit_code(vcpu, 1, can_cast, &vmcb), 1);
	if (unlikely(ledger->phase != GUEST))
		return leave_late(ledger, slot, now, vmcb != own);
	if (unlikely(vmcb != own))
		return leave_nested(ledger, slot, now);
	return leave_guest(ledger, slot, now, 0);
}

SEC("raw_tracepoint/kvm_exit")
int on_vmx_exit(struct bpf_raw_tracepoint_args *args)
{
	return leave_vmx(args, 1);
}

SEC("raw_tracepoint/kvm_exit")
int on_svm_exit(struct bpf_raw_tracepoint_args *args)
{
	return leave_svm(args, 1);
}

SEC("raw_tracepoint/kvm_exit")
int on_vmx_exit_by_probe(struct bpf_raw_tracepoint_args *args)
{
	return leave_vmx(args, 0);
}

SEC("raw_tracepoint/kvm_exit")
int on_svm_exit_by_probe(struct bpf_raw_tracepoint_args *args)
{
	return leave_svm(args, 0);
}

static __always_inline struct tables *tables_of(u32 index)
{
	return bpf_map_lookup_elem(&tables, &index);
}

/* Handle an exit of a vCPU that has tables. Note its details, as far as they are known now. */
static __always_inline int leave_detailed(struct bpf_raw_tracepoint_args *args, int is_svm)
{
	u64 vcpu = first_of(args);
	u64 now = bpf_ktime_get_ns();
	struct here *here = here_with(vcpu, GUEST);
	struct ledger *ledger = ledger_at(here->ledger);
	u32 index = here->index, which;
	struct owner *owner = bpf_map_lookup_elem(&owners, &index);
	struct tables *tables = tables_of(index);
	u64 vmcb = 0, slot;
	int nested;

	if (here->vcpu & UNMETERED || !owner || !tables)
		return lose_exit();
	slot = slot_of(exit_code(vcpu, is_svm, known(can_cast) != 0, &vmcb), is_svm);
	slot = counted_as(ledger, slot);
	nested = is_nested(here, vcpu, vmcb, is_svm);

	which = slot | OWNER_PENDING | (nested ? WHICH_NESTED : 0);
	owner->rip = 0;
	if (is_svm && !(known(vcpu_protected) != ABSENT && read_kernel(u8, vcpu + known(vcpu_protected))))
		owner->rip = read_kernel(u64, vmcb + known(vmcb_rip));
	else
		which |= WHICH_NO_RIP;
	owner->key = is_svm ? svm_key(vcpu, vmcb, slot) : vmx_key_of_registers(vcpu, slot);
	owner->pending = which;
	owner->kernel = 0;

	now = begin_transition(ledger, now, ledger->last);
	/* Readers copy this data, so it is written in the transition. */
	if (!tables->has_begun)
		begin_tables(ledger, tables, now);
	owner->exits++;
	if (is_svm && ledger->phase != GUEST)
		return leave_late(ledger, slot, now, nested);
	return leave_guest(ledger, slot, now, nested);
}

SEC("raw_tracepoint/kvm_exit")
int on_vmx_exit_detailed(struct bpf_raw_tracepoint_args *args)
{
	return leave_detailed(args, 0);
}

SEC("raw_tracepoint/kvm_exit")
int on_svm_exit_detailed(struct bpf_raw_tracepoint_args *args)
{
	return leave_detailed(args, 1);
}

/* Return an entry of the table of buckets. */
static __always_inline u64 bucket_at(u64 place)
{
	return *(u8 *)(value_of(&buckets) + place);
}

/* Return the bucket of a time. The table has a step for each nine bits, and bucket bounds are multiples of 32 ticks. */
static __noinline u64 bucket_of(u64 ticks)
{
	u64 place;

	if (!(ticks >> 16))
		place = ticks >> 5;
	else if (!(ticks >> 25))
		place = BUCKET_STEP + (ticks >> 14);
	else if (!(ticks >> 34))
		place = 2 * BUCKET_STEP + (ticks >> 23);
	else if (!(ticks >> 43))
		place = 3 * BUCKET_STEP + (ticks >> 32);
	else
		return BUCKETS - 1;
	forget(place);
	return place < BUCKET_STEPS * BUCKET_STEP ? bucket_at(place) : 0;
}

/* Add a sample to a row's histogram and maximum. */
static __always_inline void sample(struct ledger *ledger, struct row *row, u64 ticks, u64 bucket)
{
	u64 place;

	if (unlikely(ticks > row->cells[MAX]))
		row->cells[MAX] = ticks;
	place = row->cells[HISTOGRAM] + bucket;
	/* The index is below (1 + HISTOGRAMS) * BUCKETS. Behind the last ledger is room for any index that the mask leaves. */
	asm volatile("%0 &= 0xfff" : "+r"(place));
	ledger->histograms[0][place]++;
}

/* Slow path of an entry: it takes long, or ticks are carried. */
static __noinline int enter_unusually(struct ledger *ledger, struct row *row, u64 now, u64 ticks)
{
	u64 carried = ledger->carried;

	ledger->phase = GUEST;
	ledger->carried = 0;
	if (carried != CLOSED)
		sample(ledger, row, ticks + carried, bucket_of(ticks + carried));
	end_transition(ledger, now);
	return 0;
}

/* Handle an entry: end the kernel's time, which completes the time of the latest exit. */
static __always_inline int enter_guest(struct ledger *ledger)
{
	u64 ticks, carried, last, now;
	struct row *row;

	/* The clock is read late, so that the work before counts as the kernel's time and not the guest's. */
	now = bpf_ktime_get_ns();
	last = ledger->last;
	now = begin_transition(ledger, now, last);
	ticks = now - last;
	row = row_at(ledger, ledger->row);
	row->cells[CYCLES + KERNEL] += ticks;
	carried = ledger->carried;
	if (unlikely(carried || ticks >> 16))
		return enter_unusually(ledger, row, now, ticks);
	/* carried is 0, which is GUEST, and it is in a register. */
	ledger->phase = carried;
	sample(ledger, row, ticks, bucket_at(ticks >> 5));
	end_transition(ledger, now);
	return 0;
}

static __noinline int enter_slowly(u64 vcpu)
{
	struct here *here = here_with(vcpu, KERNEL);

	return here->vcpu & UNMETERED ? 0 : enter_guest(ledger_at(here->ledger));
}

SEC("raw_tracepoint/kvm_entry")
int on_entry(struct bpf_raw_tracepoint_args *args)
{
	u64 vcpu = first_of(args);
	struct here *here = this_cpu();

	if (unlikely(here->vcpu != vcpu))
		return enter_slowly(vcpu);
	return enter_guest(ledger_at(here->ledger));
}

/* Handle an entry of a vCPU that has tables. */
SEC("raw_tracepoint/kvm_entry")
int on_entry_detailed(struct bpf_raw_tracepoint_args *args)
{
	u64 vcpu = first_of(args);
	struct here *here = here_with(vcpu, KERNEL);
	struct ledger *ledger = ledger_at(here->ledger);
	u32 index = here->index;
	struct owner *owner = bpf_map_lookup_elem(&owners, &index);
	struct tables *tables = tables_of(index);
	u64 now, last, ticks, carried;
	struct row *row;

	if (here->vcpu & UNMETERED || !owner || !tables)
		return 0;
	now = bpf_ktime_get_ns();
	last = ledger->last;
	now = begin_transition(ledger, now, last);
	ticks = now - last;
	settle(tables, owner, vcpu);
	book_kernel(tables, owner, ticks);
	row = row_at(ledger, ledger->row);
	row->cells[CYCLES + KERNEL] += ticks;
	ledger->phase = GUEST;
	carried = ledger->carried;
	ledger->carried = 0;
	if (carried != CLOSED) {
		carried += ticks;
		sample(ledger, row, carried, bucket_of(carried));
	}
	end_exit(tables, owner, now, carried);
	end_transition(ledger, now);
	return 0;
}

/* Book @ticks of the phase @left in the tables of a vCPU that is back on a CPU. */
static __always_inline void resume_detailed(u32 index, u32 left, u64 ticks)
{
	struct owner *owner = bpf_map_lookup_elem(&owners, &index);
	struct tables *tables = tables_of(index);

	if (!owner || !tables)
		return;
	if (left == KERNEL) {
		book_kernel(tables, owner, ticks);
	} else if (left != GUEST) {
		if (left == USER)
			book_user(tables, ticks);
		add_away(&tables->slow, left, ticks);
	}
}

/* Return why the vCPU leaves its CPU for user space: KVM_EXIT_* of KVM_RUN, or ABSENT. */
static __always_inline u64 why_user(u64 vcpu)
{
	u64 run;

	if (known(vcpu_wants_to_run) == ABSENT || !read_kernel(u8, vcpu + known(vcpu_wants_to_run)))
		return ABSENT;
	run = read_kernel(u64, vcpu + known(vcpu_run));
	/* This is exit_reason of struct kvm_run (linux/kvm.h). All reasons are below 2^16. */
	return read_kernel(u32, run + 8) & 0xffff;
}

/* Book @ticks of the phase @left in the tables of a vCPU that leaves its CPU for @phase. */
static __always_inline void leave_cpu_detailed(u32 index, u64 vcpu, u32 slot, u32 left, u32 phase, u64 ticks)
{
	struct owner *owner = bpf_map_lookup_elem(&owners, &index);
	struct tables *tables = tables_of(index);
	u32 cpu = bpf_get_smp_processor_id() + 1;
	struct slow *slow;
	u64 why;

	if (!owner || !tables)
		return;
	slow = &tables->slow;
	why = phase == USER ? why_user(vcpu) : ABSENT;
	if (left == KERNEL) {
		if (phase == USER)
			settle(tables, owner, vcpu);
		book_kernel(tables, owner, ticks);
		if (!slow->cpu)
			slow->cpu = cpu > 0xffff ? 0xffff : cpu;
		if (phase != USER)
			slow->outs++;
		if (why != ABSENT)
			slow->why = 1 << 16 | (u32)why;
	} else if (left != GUEST) {
		if (left == USER)
			book_user(tables, ticks);
		add_away(slow, left, ticks);
	}
	if (phase == USER)
		count_user(tables, slot, why);
}

/* kvm_arch_vcpu_load(): the vCPU takes a CPU, in KVM. */
AT_FUNCTION(kvm_arch_vcpu_load, on_load)
{
	u64 now = bpf_ktime_get_ns();
	struct here *here = here_with(vcpu, KERNEL);
	struct ledger *ledger = ledger_at(here->ledger);
	u64 last;

	if (known(vcpu_scheduled_out) == ABSENT)
		here->scheduled_out = 0;
	if (here->vcpu & UNMETERED)
		return 0;
	last = ledger->last;
	now = begin_transition(ledger, now, last);
	if (known(details))
		resume_detailed(here->index, ledger->phase, now - last);
	book(ledger, ledger->phase, now - last);
	ledger->phase = KERNEL;
	end_transition(ledger, now);
	return 0;
}

/* Return true if the current task could run, like task_is_runnable(), and before Linux 6.12 like kvm_sched_out(). */
static __always_inline int current_is_runnable(void)
{
	u64 task = bpf_get_current_task();

	/* The field is an int before Linux 7.3, whose low byte tells as much. */
	if (!read_kernel(u8, task + known(task_on_rq)))
		return 0;
	return known(task_sched_delayed) == ABSENT || !read_kernel(u8, task + known(task_sched_delayed));
}

/* Return the phase of a vCPU that the scheduler takes off its CPU; see phase_scheduled_out() in src/kvm/vcpu.rs. */
static __always_inline u32 phase_scheduled_out(u64 vcpu)
{
	if (read_kernel(u8, vcpu + known(vcpu_preempted)) || current_is_runnable())
		return PREEMPTED;
	return read_kernel(u64, vcpu + known(vcpu_blocking)) ? HALTED : WAITING;
}

/* kvm_arch_vcpu_put(): the vCPU leaves its CPU. */
AT_FUNCTION(kvm_arch_vcpu_put, on_put)
{
	u64 now = bpf_ktime_get_ns();
	struct here *here = here_with(vcpu, KERNEL);
	struct ledger *ledger = ledger_at(here->ledger);
	u64 ticks, carried, last;
	struct owner *owner;
	u32 phase, left;
	u32 index;
	int out;

	if (known(vcpu_scheduled_out) == ABSENT) {
		out = here->scheduled_out;
		here->scheduled_out = 0;
	} else {
		out = read_kernel(u8, vcpu + known(vcpu_scheduled_out));
	}
	if (here->vcpu & UNMETERED)
		return 0;
	phase = out ? phase_scheduled_out(vcpu) : USER;
	last = ledger->last;
	now = begin_transition(ledger, now, last);
	ticks = now - last;
	left = ledger->phase;
	if (known(details))
		leave_cpu_detailed(here->index, vcpu, ledger->slots[row_number(ledger->row)], left, phase, ticks);
	book(ledger, left, ticks);
	ledger->phase = phase;
	carried = ledger->carried;
	if (left == GUEST)
		/* No exit followed the entry, for example because it failed. */
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

/* kvm_sched_out(), before Linux 6.10, where the vCPU has no field scheduled_out: kvm_arch_vcpu_put() comes next. */
AT_FUNCTION(kvm_sched_out, on_sched_out)
{
	this_cpu()->scheduled_out = 1;
	return 0;
}

/* kvm_nested_vmenter, on VMX: the vCPU that this CPU holds is about to run a nested guest. */
SEC("raw_tracepoint/kvm_nested_vmenter")
int on_nested_entry(struct bpf_raw_tracepoint_args *args)
{
	struct here *here = this_cpu();
	struct owner *owner;
	u32 index;

	if (here->vcpu)
		here->vcpu |= NESTS;
	index = here->index;
	owner = bpf_map_lookup_elem(&owners, &index);
	if (owner)
		owner->nests = 1;
	return 0;
}

static __always_inline void raise(u64 *to, u64 value)
{
	u64 before = *to;

	/* Another CPU may add a vCPU at the same time. Each failed try means that one has. */
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

/* Add one bucket of a row's histogram to the totals. This is a body of bpf_loop(), like the next function. */
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
	samples = folding->ledger->histograms[0][place];
	if (samples)
		__sync_fetch_and_add(&folding->totals->histograms[slot][bucket], samples);
	return 0;
}

_Static_assert(sizeof(struct sums) == (2 + PHASES + 1) * sizeof(u64), "fold_row() adds each number");

/* Add one row to the totals. */
static long fold_row(u32 number, struct folding *folding)
{
	struct ledger *ledger = folding->ledger;
	struct sums *to;
	u64 *from;
	u32 slot;

	forget(number);
	if (number >= ROWS || number >= ledger->taken)
		return 1;
	slot = ledger->slots[number];
	forget(slot);
	if (slot >= SLOTS)
		return 1;
	from = ledger->rows[number];
	to = &folding->totals->rows[slot];
	__sync_fetch_and_add(&to->exits, from[EXITS]);
	__sync_fetch_and_add(&to->nested_exits, ledger->nested[number]);
#pragma unroll
	for (u32 phase = 0; phase < WAITING; phase++)
		__sync_fetch_and_add(&to->cycles[phase], from[CYCLES + phase]);
	__sync_fetch_and_add(&to->cycles[WAITING], ledger->waiting[number]);
	raise(&to->max, from[MAX]);
	folding->slot = slot;
	folding->place = from[HISTOGRAM];
	if (folding->place)
		bpf_loop(BUCKETS, fold_bucket, folding, 0);
	return 0;
}

/* Reset a vCPU's tables to those that have not begun. */
static __always_inline void forget_tables(u32 index)
{
	struct tables *of_vcpu = tables_of(index);
	u32 zero = 0;
	struct tables *empty = bpf_map_lookup_elem(&no_tables, &zero);

	if (of_vcpu && empty)
		bpf_probe_read_kernel(of_vcpu, sizeof(*of_vcpu), empty);
}

/* Remove a vCPU from a CPU's cache. */
static long forget_vcpu(u32 cpu, u64 *vcpu)
{
	struct here *here = here_of(cpu);
	u64 had = here->vcpu;

	/* That CPU may cache another vCPU at this moment. */
	if ((had & ~FLAGS) == *vcpu)
		__sync_val_compare_and_swap(&here->vcpu, had, 0);
	return 0;
}

/* Add a vCPU that is gone to the totals. @is_new is true if another vCPU has its address now. */
static __always_inline int let_go(u64 vcpu, int is_new)
{
	u32 *had = bpf_map_lookup_elem(&vcpus, &vcpu);
	u32 zero = 0;
	struct totals *totals = bpf_map_lookup_elem(&departed, &zero);
	struct ledger *empty = bpf_map_lookup_elem(&empty_ledger, &zero);
	struct folding folding = { 0 };
	struct ledger *ledger;
	struct owner *owner;
	struct vm *vm;
	u32 index;
	u64 kvm;

	if (!had || !totals || !empty)
		return 0;
	index = *had;
	bpf_map_delete_elem(&vcpus, &vcpu);
	bpf_loop(known(cpu_mask) + 1, forget_vcpu, &vcpu, 0);
	ledger = ledger_at((u64)index * sizeof(struct ledger));
	owner = bpf_map_lookup_elem(&owners, &index);
	if (!owner)
		return 0;

	/* A reader that finds another generation afterwards has also found the vCPU in the totals. */
	folding.ledger = ledger;
	folding.totals = totals;
	__sync_fetch_and_add(&totals->begun, 1);
	bpf_loop(ROWS, fold_row, &folding, 0);
	__sync_fetch_and_add(&totals->polled, is_new ? owner->polled : polled_by(vcpu) - owner->polled_before);
	*(volatile u64 *)&owner->generation = owner->generation + 1;
	__sync_fetch_and_add(&totals->done, 1);
	kvm = owner->kvm;
	vm = bpf_map_lookup_elem(&vms, &kvm);
	if (vm && __sync_fetch_and_add(&vm->metered, -1) == 1)
		bpf_map_delete_elem(&vms, &kvm);
	bpf_probe_read_kernel(ledger, sizeof(*ledger), empty);
	if (known(details))
		forget_tables(index);
	owner->exits = 0;
	owner->pending = 0;
	bpf_map_push_elem(&unused, &index, BPF_ANY);
	return 0;
}

/*
 * kvm_mmu_destroy(): KVM destroys a vCPU, and will not load it again.
 *
 * The hook is not at kvm_arch_vcpu_destroy(), which calls this function last: in between VMX loads the vCPU
 * (nested_vmx_free_vcpu()).
 */
AT_FUNCTION(kvm_mmu_destroy, on_destroy)
{
	return let_go(vcpu, 0);
}

/*
 * kvm_mmu_create(): KVM makes a vCPU. If a vCPU with this address is still metered, the kernel has skipped on_destroy(). It
 * does so if the same program was preempted on this CPU.
 */
AT_FUNCTION(kvm_mmu_create, on_create)
{
	return let_go(vcpu, 1);
}

char gpl[] SEC("license") = "GPL";
