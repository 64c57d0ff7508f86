// SPDX-License-Identifier: GPL-2.0
/*
 * Make the fault that the parameter names when the module is loaded, to test
 * that the lab notices it. Some faults are only seen by debug kernels
 * (cargo lab run --kernel debug, kcsan or cfi).
 */
#include <linux/bug.h>
#include <linux/compiler.h>
#include <linux/delay.h>
#include <linux/err.h>
#include <linux/jiffies.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/panic.h>
#include <linux/preempt.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/timer.h>

/* Length of ENDBR64, in bytes. */
#define ENDBR 4

static char *kind = "";
module_param(kind, charp, 0);
MODULE_PARM_DESC(kind, "the name of a fault; the table in fault.c has them all");

static void fault_warn(void)
{
	WARN_ON(1);
}

static void fault_oops(void)
{
	*(volatile int *)8 = 1;
}

static void fault_bug(void)
{
	BUG();
}

static void fault_panic(void)
{
	panic("as it was asked for");
}

static void fault_softlockup(void)
{
	preempt_disable();
	for (;;)
		cpu_relax();
}

static noinline void fault_target(void)
{
	pr_info("fault: called past its ENDBR\n");
}

/* IBT: calls a function past its ENDBR64, which marks targets of indirect calls. */
static void fault_ibt(void)
{
	void (*call)(void) = fault_target;

	OPTIMIZER_HIDE_VAR(call);
	call = (void (*)(void))((unsigned long)call + ENDBR);
	call();
}

static noinline void fault_number(int number)
{
	pr_info("fault: called as a function of another type\n");
}

/* CFI: calls a function through a pointer of another type. */
static void fault_type(void)
{
	void (*call)(void) = (void *)fault_number;

	OPTIMIZER_HIDE_VAR(call);
	call();
}

/* KASAN: writes to memory that was freed. */
static void fault_freed(void)
{
	char *memory = kzalloc(16, GFP_KERNEL);

	if (!memory)
		return;
	OPTIMIZER_HIDE_VAR(memory);
	kfree(memory);
	WRITE_ONCE(memory[3], 1);
}

/* UBSAN: shifts an int by more than its width. */
static void fault_shift(void)
{
	int by = 40;

	OPTIMIZER_HIDE_VAR(by);
	pr_info("fault: 1 << %d is %d\n", by, 1 << by);
}

/* lockdep: takes two locks in both orders, which can deadlock two tasks. */
static void fault_locks(void)
{
	static DEFINE_MUTEX(one);
	static DEFINE_MUTEX(two);

	mutex_lock(&one);
	mutex_lock(&two);
	mutex_unlock(&two);
	mutex_unlock(&one);

	mutex_lock(&two);
	mutex_lock(&one);
	mutex_unlock(&one);
	mutex_unlock(&two);
}

/* PROVE_RCU: dereferences an RCU pointer outside a read-side critical section. */
static void fault_rcu(void)
{
	static char __rcu *pointer;

	pr_info("fault: %p\n", rcu_dereference(pointer));
}

/* DEBUG_ATOMIC_SLEEP: sleeps with a spinlock held. */
static void fault_sleep(void)
{
	static DEFINE_SPINLOCK(lock);

	spin_lock(&lock);
	msleep(20);
	spin_unlock(&lock);
}

static void fault_never(struct timer_list *timer)
{
}

/* DEBUG_OBJECTS: frees the memory of an active timer. */
static void fault_timer(void)
{
	struct timer_list *timer = kzalloc(sizeof(*timer), GFP_KERNEL);

	if (!timer)
		return;
	timer_setup(timer, fault_never, 0);
	mod_timer(timer, jiffies + 3600 * HZ);
	kfree(timer);
}

/*
 * kmemleak: leaks memory that nothing points to. The next scans find all but
 * perhaps the last allocation, to which an old stack may point for long.
 */
static void fault_leak(void)
{
	int count;

	for (count = 0; count < 10; count++) {
		void *memory = kzalloc(4000, GFP_KERNEL);

		pr_info("fault: one of %zu bytes is lost\n", ksize(memory));
	}
}

static unsigned long fault_shared;

static int fault_add(void *unused)
{
	while (!kthread_should_stop()) {
		fault_shared++;
		cond_resched();
	}
	return 0;
}

/* KCSAN: two threads write a variable without marking the accesses. */
static void fault_race(void)
{
	struct task_struct *one = kthread_run(fault_add, NULL, "fault/1");
	struct task_struct *two = kthread_run(fault_add, NULL, "fault/2");

	msleep(5000);
	if (!IS_ERR(one))
		kthread_stop(one);
	if (!IS_ERR(two))
		kthread_stop(two);
}

static const struct {
	const char *kind;
	void (*fault)(void);
} faults[] = {
	{ "warn", fault_warn },
	{ "oops", fault_oops },
	{ "bug", fault_bug },
	{ "panic", fault_panic },
	{ "softlockup", fault_softlockup },
	{ "ibt", fault_ibt },
	{ "type", fault_type },
	{ "freed", fault_freed },
	{ "shift", fault_shift },
	{ "locks", fault_locks },
	{ "rcu", fault_rcu },
	{ "sleep", fault_sleep },
	{ "timer", fault_timer },
	{ "leak", fault_leak },
	{ "race", fault_race },
};

static int __init fault_init(void)
{
	unsigned int at;

	for (at = 0; at < ARRAY_SIZE(faults); at++) {
		if (!strcmp(kind, faults[at].kind)) {
			faults[at].fault();
			return 0;
		}
	}
	return -EINVAL;
}

static void __exit fault_exit(void)
{
}

module_init(fault_init);
module_exit(fault_exit);

MODULE_DESCRIPTION("Does wrong on request");
MODULE_LICENSE("GPL");
