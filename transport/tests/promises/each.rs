//! The list of promises: a module for each kind of wire, a test for each promise.

macro_rules! promises {
    ($($wire:ident by $make:path;)*) => {
        $(mod $wire {
            promises!(@each $make, messages::messages_of_every_size_arrive_whole,
                messages::messages_that_fill_a_frame_pass_among_large_ones,
                messages::a_receive_may_be_longer_than_its_message,
                messages::a_message_that_does_not_fit_fails_and_the_next_passes,
                messages::a_full_queue_gives_the_slice_back,
                messages::nobody_is_sent_to_who_is_not_there,
                order::tags_do_not_wait_for_each_other,
                order::messages_of_one_tag_keep_their_order,
                order::empty_messages_pass_a_full_window,
                order::probe_finds_and_cancel_takes_back,
                loans::posted_and_lent_go_together_in_all_four_ways,
                loans::loans_given_back_make_room,
                loans::loans_are_given_back_in_any_order_from_any_thread,
                loans::a_loan_not_posted_is_given_back,
                loans::loans_that_nobody_receives_hold_up_no_other_tag,
                loss::a_peer_that_dies_fails_everything_posted_once,
                loss::one_peer_that_dies_takes_no_other_with_it,
                loss::a_goodbye_comes_after_everything_that_was_sent,
                loss::shutdown_waits_for_large_messages,
                loss::disconnect_tells_the_reason,
                waiting::park_ends_by_data_by_a_wake_and_by_the_clock,
                waiting::no_wake_up_is_lost_between_two_sleepers,
                random::a_thousand_random_operations_come_out_right);
        })*
    };
    (@each $make:path, $($room:ident::$promise:ident),*) => {
        $(#[test]
        fn $promise() {
            crate::promises::$room::$promise($make);
        })*
    };
}
